"""The fine stage of federated training: what rounds teach, when a mode changes, and when a client tries another."""

import json

import numpy as np

from moqa.federated.coarse import Limits, ModeOptions
from moqa.federated.fine import FineAllocator
from moqa.federated.learned import Observation, learned


class TestFine:
    def propose(self, fine, round_, modes, options, limits=None, rounds=None):
        features = np.zeros((len(modes), 4))
        clients_ = list(range(len(modes)))
        return fine.propose(round_, clients_, np.array(modes), features, options, limits or Limits(), rounds=rounds)

    def course(self, fine, modes, options, gains, rounds, limits=None, slowness=(1.0, 1.0), last=None):
        """Rounds in which a mode brings what `gains` says; what was said, and the modes at the end."""
        kept, said = options.gains / options.gains.max(1, keepdims=True), []
        for round_ in rounds:
            fine.observe([
                Observation(c, (0.0,) * 4, m, gains[m], slowness[m], kept[c, m]) for c, m in enumerate(modes)
            ])  # fmt: skip
            found, lines = self.propose(fine, round_, modes, options, limits, last)
            said, modes = said + lines, found.tolist()
        return said, modes

    def options(self, gains, seconds, clients=4):
        return ModeOptions(np.array([gains] * clients), np.array([seconds] * clients), np.ones((clients, 2), np.int64))

    def test_learns_that_a_mode_brings_more_and_waits_before_it_changes(self):
        fine = FineAllocator(("ptq", "qat"))
        limits = Limits(seconds=2.0)
        said, modes = self.course(
            fine, [0, 0, 1, 1], self.options([1.0, 1.0], [1.0, 1.1]), (-0.3, -0.1), range(2, 12), limits
        )
        assert modes == [1, 1, 1, 1]
        assert said[0].startswith("round 3: client 0 ptq -> qat: predicted to bring +")
        assert "(1 -> 1.1 s)" in said[0]

    def test_a_first_guess_that_is_wrong_is_given_up(self):
        """A mode that was to bring twice as much, and brings the same in each round, takes longer for nothing."""
        fine = FineAllocator(("ptq", "qat"))
        said, modes = self.course(fine, [0, 0, 1, 1], self.options([0.5, 1.0], [1.0, 1.9]), (0.0, 0.0), range(2, 14))
        assert modes == [0, 0, 0, 0]
        assert any("s are too long" in line for line in said)

    def test_noise_changes_nothing(self):
        options, fine = self.options([1.0, 1.01], [1.0, 1.0]), FineAllocator(("ptq", "qat"))
        for round_ in range(2, 8):
            assert self.propose(fine, round_, [0] * 4, options)[1] == []

    def test_a_client_that_turns_out_slow_goes_back(self):
        fine, limits = FineAllocator(("ptq", "qat")), Limits(seconds=3.0)
        options = self.options([0.5, 1.0], [1.0, 2.0])
        said, modes = self.course(fine, [1, 1, 1, 0], options, (0.0, 0.0), range(2, 20), limits, (1.0, 3.0))
        assert modes == [0, 0, 0, 0]
        assert any("s are too long" in line for line in said)

    def test_a_deadline_stays_where_another_is_hardly_better(self):
        fine = FineAllocator(("ptq", "qat"))
        seconds = np.array([[1.0, 2.0], [1.0, 1.96], [1.0, 1.9]])
        first = ModeOptions(np.array([[0.1, 1.0]] * 3), seconds, np.ones((3, 2), np.int64))
        assert first.deadline() == 2.0
        assert self.propose(fine, 2, [1, 1, 1], first)[1] == []
        slightly = ModeOptions(np.array([[0.96, 1.0], [0.1, 1.0], [0.1, 1.0]]), seconds, np.ones((3, 2), np.int64))
        assert slightly.deadline() == 1.96
        assert self.propose(fine, 3, [1, 1, 1], slightly)[0].tolist() == [1, 1, 1]


class TestTrials:
    propose, options, course = TestFine.propose, TestFine.options, TestFine.course

    def test_none_where_it_could_not_change_the_decision(self):
        """PTQ is taken to bring half: one round of it shows too little, whatever it shows."""
        fine, options = FineAllocator(("ptq", "qat")), self.options([0.3, 1.0], [1.0, 1.0], clients=10)
        said, _ = self.course(fine, [0] * 3 + [1] * 7, options, (-0.7, 0.0), range(2, 10), Limits(1.0), last=20)
        assert not any("to see what it brings" in line for line in said)

    def test_one_at_a_time_with_rounds_between_and_none_at_the_end(self):
        fine, options = FineAllocator(("ptq", "qat")), self.options([0.97, 1.0], [1.0, 1.0], clients=20)
        said, _ = self.course(fine, [1] * 20, options, (0.0, 0.0), range(2, 21), Limits(1.0), last=20)
        begun = [int(line.split()[1].rstrip(":")) for line in said if "to see what it brings" in line]
        over = [int(line.split()[1].rstrip(":")) for line in said if "the trial is over" in line]
        assert begun[0] == 2
        assert over == [round_ + 1 for round_ in begun]
        assert min(np.diff(begun)) >= 3
        assert begun[-1] < 20

    def test_the_client_with_the_least_to_lose_goes_first(self):
        gains = np.array([[0.97, 1.0], [0.097, 0.1], [0.485, 0.5]])
        options = ModeOptions(gains, np.ones((3, 2)), np.ones((3, 2), np.int64))
        _, said = self.propose(FineAllocator(("ptq", "qat")), 2, [1, 1, 1], options, rounds=20)
        assert said == ["round 2: client 1 qat -> ptq: to see what it brings (1 -> 1 s)"]

    def test_none_beyond_deadline_or_bytes(self):
        gains = np.array([[1.0, 0.97]] * 3)
        slow = ModeOptions(gains, np.array([[1.0, 3.0]] * 3), np.ones((3, 2), np.int64))
        large = ModeOptions(gains, np.ones((3, 2)), np.array([[1, 2]] * 3))
        free = FineAllocator(("ptq", "qat"))
        assert self.propose(FineAllocator(("ptq", "qat")), 2, [0] * 3, slow, Limits(2.0), 20)[1] == []
        assert self.propose(FineAllocator(("ptq", "qat")), 2, [0] * 3, large, Limits(2.0, 3), 20)[1] == []
        assert len(self.propose(free, 2, [0] * 3, large, Limits(2.0, 4), 20)[1]) == 1

    def test_the_same_after_a_restart(self):
        options, lines = self.options([0.97, 1.0], [1.0, 1.0], clients=20), {}
        for restarted in (False, True):
            fine, modes, lines[restarted] = FineAllocator(("ptq", "qat")), [1] * 20, []
            for round_ in range(2, 12):
                if restarted:
                    state = json.loads(json.dumps(fine.state()))
                    fine = FineAllocator(("ptq", "qat"))
                    fine.restore(state)
                said, modes = self.course(fine, modes, options, (0.0, 0.0), [round_], Limits(1.0), last=20)
                lines[restarted] += said
        assert lines[True] == lines[False]
        assert any("the trial is over" in line for line in lines[True])


class TestLearned:
    def seen(self, *gains, client=0, mode=0):
        return [Observation(client, (0.0,) * 4, mode, gain, 1.0) for gain in gains]

    def known(self, seen, clients=2):
        options = ModeOptions(np.array([[0.5, 1.0]] * clients), np.ones((clients, 2)), np.ones((clients, 2), np.int64))
        return learned(seen, list(range(clients)), np.zeros((clients, 4)), options, np.ones(clients, np.int64))

    def test_begins_with_the_first_guess_and_moves_towards_what_was_seen(self):
        assert self.known([]).options.gains.tolist() == [[0.5, 1.0]] * 2
        one, many = self.known(self.seen(0.4)), self.known(self.seen(*[0.4] * 30))
        assert 0.5 < one.options.gains[0, 0] < many.options.gains[0, 0] < 0.9
        # the other client learns from it, less than the client itself; modes that were not seen stay
        assert 0.5 < many.options.gains[1, 0] < many.options.gains[0, 0]
        assert many.options.gains[:, 1].tolist() == [1.0, 1.0]

    def test_doubt_falls_with_what_was_seen_and_so_does_the_worth_of_trials(self):
        none, many = self.known([]), self.known(self.seen(*[0.0] * 30) + self.seen(*[0.0] * 30, mode=1))
        assert many.doubts[0, 0] < many.doubts[1, 0] < none.doubts[1, 0]
        assert none.doubts[:, 1].tolist() == [0.0, 0.0]
        present = np.ones(2, np.int64)
        assert (many.worth(present, 0.05)[:, 0] < none.worth(present, 0.05)[:, 0] / 10).all()
