"""The guard `personal-data`: what it finds, and what only looks like it."""

# ruff: noqa: RUF001 - widths and dashes of Unicode are found, too

from __future__ import annotations

import time

import pytest

from mmhub.spec import Change, Refusal
from mmhub_guards.personal import PersonalData

GUARD = PersonalData(PersonalData.Config())

FOUND = [
    ("mail jo.do@example.com now", "mail [EMAIL] now"),
    ("<a+b_c@mail.example.co.uk>", "<[EMAIL]>"),
    ("jürgen@beispiel.de, x@y.io", "[EMAIL], [EMAIL]"),
    ("it is +49 30 901820.", "it is [PHONE]."),
    ("+1 (212) 555-0199", "[PHONE]"),
    ("+442079460958", "[PHONE]"),
    ("0049 30 901820", "[PHONE]"),
    ("(212) 555-0199 or 212-555-0199 or 212.555.0199", "[PHONE] or [PHONE] or [PHONE]"),
    ("call 020 7946 0958 now", "call [PHONE] now"),
    ("Tel.: 030/901820-12", "Tel.: [PHONE]"),
    ("my phone number is 0171 1234567", "my phone number is [PHONE]"),
    ("4111 1111 1111 1111", "[CARD]"),
    ("5500-0000-0000-0004", "[CARD]"),
    ("amex 378282246310005 ok", "amex [CARD] ok"),
    ("DE89 3704 0044 0532 0130 00 please", "[IBAN] please"),
    ("GB82WEST12345698765432", "[IBAN]"),
    ("FR14 2004 1010 0505 0001 3M02 606 PAY", "[IBAN] PAY"),
    ("from 192.168.1.17:8080", "from [IP]:8080"),
    ("2001:db8::8a2e:370:7334", "[IP]"),
    ("SSN 078-05-1120", "SSN [ID]"),
    ("NI AB 12 34 56 C", "NI [ID]"),
    ("NIR 1 84 12 76 451 089 46", "NIR [ID]"),
    ("Steuer-ID: 86 095 742 719", "Steuer-ID: [ID]"),
    ("born on 3 May 1980 in Rome", "born on [BIRTH] in Rome"),
    ("Date of birth: 1980-05-03", "Date of birth: [BIRTH]"),
    ("geboren am 3.5.1980", "geboren am [BIRTH]"),
    ("née le 03/05/1980", "née le [BIRTH]"),
    ("+49\u00a030\u00a0901820, +49\u201130\u2011901820", "[PHONE], [PHONE]"),
    ("+1.212.555.0199", "[PHONE]"),
    ("+34 612 345 678", "[PHONE]"),
    ("call me at 5551234567, mobile: 5551234567", "call me at [PHONE], mobile: [PHONE]"),
    ("4111\u00a01111\u00a01111\u00a01111", "[CARD]"),
    ("4111.1111.1111.1111 or 4111–1111–1111–1111", "[CARD] or [CARD]"),
    ("４１１１ １１１１ １１１１ １１１１!", "[CARD]!"),
    ("4111\u200b1111\u200b1111\u200b1111", "[CARD]"),
    ("de89370400440532013000", "[IBAN]"),
    ("DE89-3704-0044-0532-0130-00.", "[IBAN]."),
    ("a@b.xn--p1ai, jo＠example。com, jo@x.org-", "[EMAIL], [EMAIL], [EMAIL]-"),
    (
        "::ffff:8.8.8.8, the server 8.8.4.4, 20.30.40.50:80 and 9.9.9.150",
        "::ffff:[IP], the server [IP], [IP]:80 and [IP]",
    ),
    ("token hf_" + "x" * 34, "token [KEY]"),
    ("key AKIA" + "A" * 16 + ";", "key [KEY];"),
    ("-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----", "[KEY]"),
]
INNOCENT = [
    "version 1.2.3.4",
    "v10.0.1.7 is out",
    "release 2.0.0.1",
    "Windows 10.0.19041.1237",
    "listen on 127.0.0.1 or 0.0.0.0",
    "netmask 255.255.255.0",
    "torch==2.11.0",
    "section 4.3.2.1 of the manual",
    "at 12:30:45",
    "12:30:45.123 +02:00",
    "2024-01-01T00:00:00+0200",
    "from 10:00-12:30 on 2024-05-03",
    "the meeting on 3 May 1980",
    "order 4111-2222",
    "order number 1234567890123456",
    "invoice 2024-000-12345",
    "ISBN 978-3-16-148410-0",
    "ISBN 9780306406157",
    "EAN 4006381333931",
    "IMEI 490154203237518",
    "commit baacb7067f306c13208cda17340646bfeeb0b21b",
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "uuid 123e4567-e89b-12d3-a456-426614174000",
    "git@host.example:org/repo.git",
    "@mention and user@localhost",
    "digits@v1 and pkg@1.2.3",
    "5 @ 3.50 each",
    "pi is 3.14159265358979",
    "x = +3.14159265",
    "population +1,234,567",
    "a rise of +12.5 %",
    "between 1914-1918 and 1939-1945",
    "pages 123-456-7",
    "part 555-12-34",
    "tracking 1Z999AA10123456784",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
    "0000 0000 0000 0000",
    "lotto 04 11 19 23 35 42",
    "call 911",
    "call 3 friends at 10 and 12",
    "ring me at 5",
    "mac 00:1a:2b:3c:4d:5e",
    "std::vector<int> a::b::c",
    "ratio 16:9:4",
    "score 21-15, 21-19",
    "DE12 is a road, and so is FR14",
    "GB82 WEST 1234 5698 7654 33",
    "AB123456 is a passport of nobody",
    "he was born in 1980",
    "3 May 2024 is the deadline",
    "the year 1984 12 76",
    "latitude 52.5200, longitude 13.4050",
    "USD 1 000 000 000",
    "10000000 rows in 00:12:07",
    "see RFC 2822, 4.4.1",
    "model-00001-of-00003.safetensors",
    "sk-learn and hf_hub_download",
    "room 212.555 of 0199",
    "0049 is where it began",
    "The call on 2024-05-03 was long.",
    "Please call on 03.05.2024 in the morning.",
    "I will call 10-15-2024 instead.",
    "text me 2024-12-24 menu",
    "Mobile (2019-2021) was the best period.",
    "Ring 1990-2000 was played at Bayreuth.",
    "In the phone 2023-2024 report sales fell.",
    "Fax 2000-3000 series is sold out.",
    "call (1939-1945) the war",
    "call 1000000 times the function",
    "The loop will call 10 000 000 functions.",
    "We call 3141592 a prime.",
    "the mobile 360 360 360 engine",
    "The cell is 12 34 56 78 in the table.",
    "Revenue rose by +12 500 000 euros last year.",
    "Le prix est de +33 000 000 000 dollars.",
    "The update from 4.0.0.0 to 4.1.0.0 failed.",
    "We use Python 3.12.0.1 here.",
    "See figure 1.2.3.4 and table 2.3.4.5.",
    "Kapitel 3.4.5.6 beschreibt das, Art. 1.2.3.4 auch.",
    "La versión 5.4.3.2 es nueva.",
    "Kernel 5.15.0.91 was installed",
    "The ratio a:b:c::1:2 holds.",
    "1:2:3:4:5:6:7:8 is a list",
    "de12 ist eine lange strasse und so weiter",
]


@pytest.mark.parametrize(("text", "redacted"), FOUND)
def test_personal_data_are_redacted_by_kind(text: str, redacted: str) -> None:
    changed = GUARD.rewrite({"text": text})
    assert isinstance(changed, Change)
    assert changed.value == {"text": redacted}
    assert GUARD.rewrite(changed.value) is changed.value  # what is redacted is harmless


@pytest.mark.parametrize("text", INNOCENT)
def test_numbers_that_only_look_like_it_stay(text: str) -> None:
    assert GUARD.clean(text) == text


def test_a_refusal_names_the_kind_and_repeats_nothing() -> None:
    refusing = PersonalData(PersonalData.Config(action="refuse", kinds=("email", "iban")))
    found = refusing.check({"text": ["ok", "write to jo@example.com"]})
    assert found == Refusal("it holds an e-mail address", "email")
    assert refusing.check({"text": "call 020 7946 0958"}) == ""
    assert refusing.review({}, {"text": "jo@example.com", "finish": "end"}) == found


def test_an_address_parted_between_two_parts_of_a_message_is_found() -> None:
    parts = [
        {"type": "text", "text": "jo@exam"},
        {"type": "text", "text": "ple.com"},
        {"type": "image", "image": "a.png"},
    ]
    changed = GUARD.rewrite({"messages": [{"role": "user", "content": parts}]})
    assert isinstance(changed, Change)
    assert changed.value["messages"][0]["content"] == [{"type": "text", "text": "[EMAIL]"}, parts[2]]
    assert (changed.rule, changed.reason) == ("email", "replaced: email")


def test_a_number_parted_between_segments_or_words_is_found() -> None:
    segments = [{"text": " call me at 020 7946", "start": 0, "end": 2}, {"text": " 0958", "start": 2, "end": 3}]
    changed = GUARD.review({}, {"text": "call me at 020 7946 0958", "segments": segments})
    assert isinstance(changed, Change) and changed.value == {"text": "call me at [PHONE]"}
    alone = [{"text": " jo@x.org"}, {"text": " and so on"}]
    changed = GUARD.review({}, {"text": "jo@x.org and so on", "segments": alone})
    assert isinstance(changed, Change)
    assert changed.value["segments"] == [{"text": " [EMAIL]"}, {"text": " and so on"}]
    words = ["call", "020", "7946", "0958"]
    assert GUARD.check({"text": words}) == Refusal("it holds a telephone number", "phone")
    answer = {"tags": ["O"] * 4, "words": words, "entities": []}
    changed = GUARD.review({}, answer)
    assert isinstance(changed, Change) and changed.value == {"tags": ["O"] * 4}


@pytest.mark.parametrize(
    "piece", ["1 ", "1", "a.", "a@", "+1 ", "DE12 ", "1:", "Tel. 1", "A1", "born on ", "8.8.8.200 ", "a@b.co "]
)
def test_long_texts_of_one_kind_take_no_time(piece: str) -> None:
    start = time.perf_counter()
    GUARD.clean(piece * (60_000 // len(piece)))
    assert time.perf_counter() - start < 3
