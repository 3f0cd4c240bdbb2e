"""Forms with files (multipart/form-data, RFC 7578), as browsers and curl send them."""

from email import policy
from email.message import EmailMessage
from email.parser import BytesHeaderParser

from moqa.serve.refusal import RefusalError

KIND = "multipart/form-data"
_MOST_PARTS = 32


def is_form(content_type: str) -> bool:
    """Whether a body is a form with files."""
    return content_type.partition(";")[0].strip().lower() == KIND


def form_fields(data: bytes, content_type: str) -> dict[str, str | bytes]:
    """The fields of a form: texts, and the bytes of files.

    >>> head = 'Content-Disposition: form-data; name="top"'
    >>> body = f"--x\\r\\n{head}\\r\\n\\r\\n3\\r\\n--x--\\r\\n".encode()
    >>> form_fields(body, "multipart/form-data; boundary=x")
    {'top': '3'}

    Args:
        data: the body.
        content_type: header of the request, which has the boundary between the fields.

    Raises:
        RefusalError: 400 if it is no such form, or is cut off.
    """
    header = EmailMessage()
    try:
        header["Content-Type"] = content_type
        boundary = header.get_boundary()
    except (ValueError, IndexError):
        boundary = None
    parts = (b"\r\n" + data).split(b"\r\n--" + boundary.encode(errors="replace")) if boundary else []
    if len(parts) < 2 or not parts[-1].startswith(b"--"):
        raise RefusalError(400, f"the body is not {KIND}, or it is cut off")
    if len(parts) > _MOST_PARTS:
        raise RefusalError(400, f"the form has more than {_MOST_PARTS - 2} fields")
    return dict(_field(part) for part in parts[1:-1])


def _field(part: bytes) -> tuple[str, str | bytes]:
    head, found, value = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
    about = BytesHeaderParser(policy=policy.compat32).parsebytes(head)
    name = about.get_param("name", header="content-disposition")
    if not found or not isinstance(name, str):
        raise RefusalError(400, "a field of the form has no name")
    if about.get_filename() is not None:
        return name, value
    try:
        return name, value.decode()
    except UnicodeDecodeError:
        raise RefusalError(400, "a text of the form is not UTF-8") from None
