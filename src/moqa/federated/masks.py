"""Masks that cancel in a sum, so that a server learns what clients add up to and nothing of any one of them.

Bonawitz et al.: Practical secure aggregation for privacy-preserving machine learning (CCS 2017), for a server that
follows the protocol. Keys, their exchange, sealing and the sharing of secrets are Flower's; the masks are not: Flower
folds a key to 32 bits before it draws from it, which can be tried out.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moqa.errors import MoqaError
from moqa.federated.flower import combine_shares, create_shares, decrypt, encrypt, key_pair, shared_key

Vector = NDArray[np.uint32]
Public = tuple[bytes, bytes]  # keys of masks and of sealed shares
_INDEX = 8  # bytes of a node's number


@dataclass(frozen=True)
class Secrets:
    """What a client keeps to itself in a round.

    >>> one, other = Secrets.fresh(), Secrets.fresh()
    >>> len(one.shares(1, {1: one.public, 2: other.public}, threshold=2))
    2

    Attributes:
        mask: private key of the masks that it has in common with each other client.
        seal: private key by which shares are sealed.
        seed: of the mask that it has alone.
        public: what others need of the first two.
    """

    mask: bytes
    seal: bytes
    seed: bytes
    public: Public

    @classmethod
    def fresh(cls) -> "Secrets":
        """New secrets; each round has its own."""
        (mask, public_mask), (seal, public_seal) = key_pair(), key_pair()
        return cls(mask, seal, os.urandom(32), (public_mask, public_seal))

    def shares(self, node: int, clients: Mapping[int, Public], threshold: int) -> dict[int, bytes]:
        """Shares of the secrets, by client, sealed for it: any `threshold` of them together give a secret away.

        Args:
            node: of the client that has the secrets.
            clients: public keys of all clients of the round, by node, itself too.
            threshold: number of clients.
        """
        pairs = zip(
            create_shares(self.seed, threshold, len(clients)), create_shares(self.mask, threshold, len(clients)),
            strict=True,
        )  # fmt: skip
        found = {}
        for (other, public), (seed, mask) in zip(clients.items(), pairs, strict=True):
            text = node.to_bytes(_INDEX, "little") + other.to_bytes(_INDEX, "little")
            text += len(seed).to_bytes(4, "little") + seed + mask
            found[other] = encrypt(shared_key(self.seal, public[1]), text)
        return found

    def opened(self, node: int, source: int, public: Public, sealed: bytes) -> tuple[bytes, bytes]:
        """Another client's share of its seed and of its key of masks.

        Raises:
            MoqaError: if the share is not from that client to this one.
        """
        try:
            text = decrypt(shared_key(self.seal, public[1]), sealed)
        except Exception:  # a forged text fails in many ways
            raise MoqaError(f"the share of client {source} is not sealed by it") from None
        ends = [int.from_bytes(text[at : at + _INDEX], "little") for at in (0, _INDEX)]
        if ends != [source, node]:
            raise MoqaError(f"the share of client {source} is one of client {ends[0]} for client {ends[1]}")
        start = 2 * _INDEX + 4
        middle = start + int.from_bytes(text[2 * _INDEX : start], "little")
        return text[start:middle], text[middle:]

    def masked(self, node: int, vector: Vector, clients: Mapping[int, Public]) -> Vector:
        """A vector under all masks of this client.

        Args:
            node: of this client.
            vector: numbers, modulo 2^32.
            clients: public keys of those whose shares this client has, itself too.
        """
        found = vector + _drawn(self.seed, len(vector))
        return found + _common(self.mask, node, clients, len(vector))


def unmasked(
    total: Vector, seeds: Iterable[Iterable[bytes]], gone: Mapping[int, Iterable[bytes]], clients: Mapping[int, Public]
) -> Vector:
    """The sum of vectors, from the sum of masked ones.

    >>> secrets = {node: Secrets.fresh() for node in range(3)}
    >>> publics = {node: one.public for node, one in secrets.items()}
    >>> sealed = {node: one.shares(node, publics, 2) for node, one in secrets.items()}
    >>> total = sum(secrets[node].masked(node, np.full(2, node, np.uint32), publics) for node in (1, 2))
    >>> def opened(source):  # node 0 has sent no vector; 1 and 2 open what they have of all
    ...     return [secrets[node].opened(node, source, publics[source], sealed[source][node]) for node in (1, 2)]
    >>> seeds = [[seed for seed, _ in opened(source)] for source in (1, 2)]
    >>> unmasked(total, seeds, {0: [mask for _, mask in opened(0)]}, publics).tolist()
    [3, 3]

    Args:
        total: sum of the vectors that have arrived, modulo 2^32.
        seeds: shares of the seed of each client whose vector is in it.
        gone: shares of the key of masks of each client that others have masks with and whose vector is not, by node.
        clients: public keys of all that have masks in common, by node.
    """
    for shares in seeds:
        total = total - _drawn(combine_shares(list(shares)), len(total))
    present = {node: public for node, public in clients.items() if node not in gone}
    for node, shares in gone.items():
        # what those that are there have in common with it does not cancel: its side of it does
        total = total + _common(combine_shares(list(shares)), node, present, len(total))
    return total


def _common(mask: bytes, node: int, clients: Mapping[int, Public], size: int) -> Vector:
    """Masks in common with others: one of the two adds what the other takes away."""
    found = np.zeros(size, np.uint32)
    for other, public in clients.items():
        if other != node:
            drawn = _drawn(shared_key(mask, public[0]), size)
            found = found + drawn if node > other else found - drawn
    return found


def _drawn(secret: bytes, size: int) -> Vector:
    return np.frombuffer(hashlib.shake_256(secret).digest(4 * size), "<u4").astype(np.uint32)
