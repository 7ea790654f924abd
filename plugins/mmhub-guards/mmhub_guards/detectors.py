"""What personal data look like: by kind, where in a text they stand. Rather too few than what is none.

Numbers count if their check digits, lengths or marks say so: cards by Luhn's sum and their issuers' first digits, IBANs
by ISO 7064, French numbers by their key, telephone numbers by "+" or the word before them. Secrets are those that
`mmhub.hub.secrets` knows by their form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from ipaddress import ip_address

Span = tuple[int, int]
Detector = Callable[[str], Iterator[Span]]

_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w][\w.+%-]{0,63}@(?:[\w-]{1,63}\.){1,6}(?:xn--[a-z0-9-]{2,59}|[^\W\d_]{2,24})(?![\w@]|-\w)"
)
_PHONE = re.compile(r"(?<![\w+.,])(?:\+|00(?=[1-9]))[1-9](?:[ ./-]?\(?\d{1,5}\)?){2,7}(?![\w%])")
_NATIONAL = re.compile(r"(?<![\w.+-])(?:\(([2-9]\d\d)\) ?|([2-9]\d\d)[-.])([2-9]\d\d)[-.](\d{4})(?![\w-]|\.\d)")
_THOUSANDS = re.compile(r"(?:\+|00)?[1-9]\d{0,2}(?:[ .]\d{3})+")
_CALLED = re.compile(
    r"(?i)(?<!\w)(?:(tel|telephone|telefon|téléphone|tél|phone|fax|handy|whatsapp|text me)|mobile|mobil|cell|call|ring)"
    r"((?: (?:number|no|nr|is|me at|me on|us at|us on|on)){0,2}[.:]{0,2}) {0,2}"
    r"(\(?\d(?:[ ./()-]{0,2}\d){6,13})(?![\w-]|\.\d)"
)
_DATES = re.compile(  # and years from one to another
    r"\(?(?:(?:1\d|20)\d\d([./-])[01]?\d\1[0-3]?\d|[0-3]?\d([./-])[0-3]?\d\2(?:1\d|20)\d\d"
    r"|[12]\d{3}\)? ?[ /-] ?\(?[123]\d{3})\)?(?!\d)"
)
_CARD = re.compile(r"(?<![\w.,-])(?:\d{4}(?:\.\d{4}){3}|\d(?:[ -]?\d){12,18})(?![\w-]|[.,]\d)")
_ISSUERS = re.compile(r"4|5[1-5]|2[2-7]|3[47]|3[068]|35|6(?:011|4[4-9]|5)")
_IBAN = re.compile(r"(?<![\w-])[A-Za-z]{2}\d\d(?:[ -]?[A-Za-z0-9]){11,30}")
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AT": 20, "BE": 16, "BG": 22, "BR": 29, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18,
    "EE": 20, "ES": 24, "FI": 18, "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26,
    "IT": 27, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25,
    "RO": 24, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TR": 26, "UA": 29,
}  # fmt: skip
_IP4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IP6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.\d)")
_HOST = re.compile(r"(?i)(?:\b(?:ip|ipv4|host|server|address|adresse|dns|gateway|ping|ssh)[ :=]{1,2}|[/@]|::ffff:)$")
_VERSION = re.compile(r"(?i)(?:\bv|versions?|release|build|firmware|driver|section|chapter|§)[ :=]{0,2}$")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])")
_NINO = re.compile(
    r"(?<!\w)(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z]( ?)\d\d\1\d\d\1\d\d\1[A-D](?!\w)"
)
_NIR = re.compile(
    r"(?<![\w-])[12] ?\d\d ?(?:0[1-9]|1[0-2]|[2-4]\d|[5-9]\d) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d(?![\w-])"
)
_GERMAN = re.compile(
    r"(?i)(?<!\w)(?:steuer-?id(?:entifikations)?(?:nummer)?|steuerliche identifikationsnummer|idnr|tax id)\.?:? {0,2}"
    r"(\d{2} ?\d{3} ?\d{3} ?\d{3})(?![\w-])"
)
_DATE = (
    r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}|\d{1,2}(?:st|nd|rd|th|\.)? [^\W\d]{3,9},? \d{4}"
    r"|[^\W\d]{3,9} \d{1,2}(?:st|nd|rd|th)?,? \d{4}"
)
_BIRTH = re.compile(
    r"(?i)(?<!\w)(?:date of birth|birth ?da(?:te|y)|d\.?o\.?b\.?|born(?: on)?|geburtsdatum|geboren(?: am)?|geb\.|"
    rf"date de naissance|née? le|nacid[oa] el|fecha de nacimiento)(?: is| was)?[:=]? {{0,2}}({_DATE})(?!\w)"
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----(?:[^-]{0,20000}-----END [A-Z ]{0,40}PRIVATE KEY-----)?"
)


def emails(text: str) -> Iterator[Span]:
    """Yield addresses; not those of git, as in git@host.org:name."""
    for found in _EMAIL.finditer(text) if "@" in text else ():
        if not found[0].startswith("git@") and ".." not in found[0]:
            yield found.span()


def phones(text: str) -> Iterator[Span]:
    """Yield telephone numbers: international ones, North America's usual forms, and any behind a word such as tel."""
    for found in _PHONE.finditer(text):
        digits = re.sub(r"\D", "", found[0]).removeprefix("00" if found[0].startswith("00") else "")
        parted = re.search(r"\d[ ()/-]", found[0]) or found[0].count(".") > 2  # or a number such as +3.1415
        amount = _THOUSANDS.fullmatch(found[0]) and (len(digits) < 10 or digits.endswith("000"))
        plain = found[0].startswith("+") and "." not in found[0]
        if 8 <= len(digits) <= 15 and not amount and (parted or plain):
            yield found.span()
    yield from (found.span() for found in _NATIONAL.finditer(text))
    for found in _CALLED.finditer(text):
        sure = found[1] or re.search(r"(?i)number|no|nr|at|me|us|:", found[2])
        number = found[3]
        innocent = _DATES.match(number) or _THOUSANDS.fullmatch(number) or not (sure or number[0] in "0(")
        if 7 <= sum(map(str.isdigit, number)) <= 13 and not innocent:
            yield found.span(3)


def cards(text: str) -> Iterator[Span]:
    """Yield numbers of payment cards."""
    for found in _CARD.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        length = {"3": (14, 15, 16), "4": (13, 16, 19)}.get(digits[0], (16,))
        short = digits.startswith(("34", "37")) == (len(digits) == 15)
        if _ISSUERS.match(digits) and len(digits) in length and short and len(set(digits)) > 1 and _luhn(digits):
            yield found.span()


def _luhn(digits: str) -> bool:
    doubled = [int(d) * 2 for d in digits[-2::-2]]
    return (sum(map(int, digits[-1::-2])) + sum(n - 9 if n > 9 else n for n in doubled)) % 10 == 0


def ibans(text: str) -> Iterator[Span]:
    """Yield account numbers of the countries that are listed here."""
    for found in _IBAN.finditer(text):
        length, compact, end = _IBAN_LENGTHS.get(found[0][:2].upper(), 0), "", found.start()
        for char in found[0].upper():
            if len(compact) == length:
                break
            compact, end = compact + char.strip(" -"), end + 1
        moved = compact[4:] + compact[:4]
        whole = len(compact) == length and not text[end : end + 1].isalnum()
        whole = whole and 2 * sum(map(str.isdigit, compact)) >= length  # else words behind a road's number
        if length and whole and int("".join(str(int(char, 36)) for char in moved)) % 97 == 1:
            yield found.start(), end


def addresses(text: str) -> Iterator[Span]:
    """Yield IP addresses of machines; not numbers of versions and chapters, nor addresses that are the same everywhere.

    Four numbers below 100 are an address behind a word that says so, or before a port or the size of a network.
    """
    for found in _IP4.finditer(text):
        before = text[max(0, found.start() - 12) : found.start()]
        large = max(map(int, found[0].split("."))) > 99 and not _VERSION.search(before)
        named = _HOST.search(before) or re.match(r":\d|/\d", text[found.end() : found.end() + 2])
        if (large or named) and _is_address(found[0]):
            yield found.span()
    for found in _IP6.finditer(text):
        long = any(len(group) > 2 for group in found[0].split(":"))
        if long and found[0].count(":") > 2 and any(map(str.isdigit, found[0])) and _is_address(found[0]):
            yield found.span()


def _is_address(text: str) -> bool:
    try:
        address = ip_address(text)
    except ValueError:
        return False
    common = address.is_loopback or address.is_unspecified or address.is_multicast
    return not common and not text.startswith(("0.", "255."))


def social(text: str) -> Iterator[Span]:
    """Yield social security and tax numbers: of the US and UK by their form, of France and Germany by check digits."""
    for pattern in (_SSN, _NINO):
        yield from (found.span() for found in pattern.finditer(text))
    for found in _NIR.finditer(text):
        digits = found[0].replace(" ", "").replace("2A", "19").replace("2B", "18")
        if digits.isdecimal() and 97 - int(digits[:13]) % 97 == int(digits[13:]):
            yield found.span()
    for found in _GERMAN.finditer(text):
        if _german(found[1].replace(" ", "")):
            yield found.span(1)


def _german(digits: str) -> bool:
    """Is it a German tax number? ISO 7064, mod 11, 10."""
    product = 10
    for digit in map(int, digits[:10]):
        product = ((digit + product) % 10 or 10) * 2 % 11
    return digits[0] != "0" and (11 - product) % 10 == int(digits[10])


def births(text: str) -> Iterator[Span]:
    """Yield dates that are said to be somebody's birth."""
    yield from (found.span(1) for found in _BIRTH.finditer(text))


def secrets(text: str) -> Iterator[Span]:
    """Yield keys and tokens of well-known forms."""
    from mmhub.hub.secrets import _KINDS

    for piece, pattern in _KINDS.values():
        if piece == "PRIVATE KEY":
            yield from (found.span() for found in _PRIVATE_KEY.finditer(text) if piece in text)
        elif piece in text:
            yield from (found.span() for found in re.finditer(pattern, text))


DETECTORS: dict[str, tuple[str, Detector]] = {  # by kind: what it is, and what finds it
    "key": ("a key", secrets),
    "email": ("an e-mail address", emails),
    "iban": ("an account number", ibans),
    "card": ("a card number", cards),
    "id": ("a social security or tax number", social),
    "birth": ("a date of birth", births),
    "ip": ("an IP address", addresses),
    "phone": ("a telephone number", phones),
}
