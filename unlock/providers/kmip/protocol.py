# SPDX-License-Identifier: Apache-2.0
"""The numbers of KMIP 1.4 that unlock writes or reads; for all other modules of this folder.

Names are those of the specification. `tests/test_kmip_encoding.py` compares the numbers with PyKMIP's.
"""

from enum import IntEnum

VERSIONS = ((1, 4), (1, 3), (1, 2), (1, 1))
"""The versions of KMIP that unlock speaks, the best first. 2.x encodes attributes differently."""

ANSWER_MAX = 1 << 20
"""Bytes of the largest answer that is read, its header included."""


class Tag(IntEnum):
    """KMIP 1.4, 9.1.3.1."""

    ATTRIBUTE = 0x420008
    ATTRIBUTE_NAME = 0x42000A
    ATTRIBUTE_VALUE = 0x42000B
    AUTHENTICATION = 0x42000C
    BATCH_COUNT = 0x42000D
    BATCH_ERROR_CONTINUATION_OPTION = 0x42000E
    BATCH_ITEM = 0x42000F
    BATCH_ORDER_OPTION = 0x420010
    CREDENTIAL = 0x420023
    CREDENTIAL_TYPE = 0x420024
    CREDENTIAL_VALUE = 0x420025
    CRYPTOGRAPHIC_ALGORITHM = 0x420028
    CRYPTOGRAPHIC_LENGTH = 0x42002A
    KEY = 0x42003F
    KEY_BLOCK = 0x420040
    KEY_FORMAT_TYPE = 0x420042
    KEY_MATERIAL = 0x420043
    KEY_VALUE = 0x420045
    KEY_WRAPPING_DATA = 0x420046
    LINK_TYPE = 0x42004B
    LINKED_OBJECT_IDENTIFIER = 0x42004C
    MAXIMUM_RESPONSE_SIZE = 0x420050
    NAME_TYPE = 0x420054
    NAME_VALUE = 0x420055
    OBJECT_TYPE = 0x420057
    OPERATION = 0x42005C
    PASSWORD = 0x4200A1
    PROTOCOL_VERSION = 0x420069
    PROTOCOL_VERSION_MAJOR = 0x42006A
    PROTOCOL_VERSION_MINOR = 0x42006B
    QUERY_FUNCTION = 0x420074
    REQUEST_HEADER = 0x420077
    REQUEST_MESSAGE = 0x420078
    REQUEST_PAYLOAD = 0x420079
    RESPONSE_HEADER = 0x42007A
    RESPONSE_MESSAGE = 0x42007B
    RESPONSE_PAYLOAD = 0x42007C
    RESULT_MESSAGE = 0x42007D
    RESULT_REASON = 0x42007E
    RESULT_STATUS = 0x42007F
    REVOCATION_REASON = 0x420081
    REVOCATION_REASON_CODE = 0x420082
    SYMMETRIC_KEY = 0x42008F
    TEMPLATE_ATTRIBUTE = 0x420091
    UNIQUE_BATCH_ITEM_ID = 0x420093
    UNIQUE_IDENTIFIER = 0x420094
    USERNAME = 0x420099


class Operation(IntEnum):
    """KMIP 1.4, 9.1.3.2.27."""

    CREATE = 0x01
    REKEY = 0x04
    LOCATE = 0x08
    GET = 0x0A
    GET_ATTRIBUTES = 0x0B
    ACTIVATE = 0x12
    REVOKE = 0x13
    QUERY = 0x18
    DISCOVER_VERSIONS = 0x1E


class ResultStatus(IntEnum):
    """KMIP 1.4, 9.1.3.2.28."""

    SUCCESS = 0
    OPERATION_FAILED = 1
    OPERATION_PENDING = 2


class ResultReason(IntEnum):
    """KMIP 1.4, 9.1.3.2.29; those that unlock does not only name. OBJECT_NOT_FOUND is of KMIP 2.0."""

    ITEM_NOT_FOUND = 0x01
    OPERATION_CANCELED_BY_REQUESTER = 0x09
    OBJECT_NOT_FOUND = 0x37


NO_SUCH_KEY = (ResultReason.ITEM_NOT_FOUND, ResultReason.OBJECT_NOT_FOUND)
"""The only reasons that say that there is none."""


class LinkType(IntEnum):
    """KMIP 1.4, 9.1.3.2.20."""

    REPLACEMENT_OBJECT_LINK = 0x106
    REPLACED_OBJECT_LINK = 0x107


CREDENTIAL_USERNAME_AND_PASSWORD = 1
CONTINUE_AFTER_ERROR, STOP_AT_ERROR = 1, 2
"""Batch Error Continuation Option."""
SYMMETRIC_KEY = 2
"""Object Type."""
AES = 3
"""Cryptographic Algorithm."""
ENCRYPT_AND_DECRYPT = 0x04 | 0x08
"""Cryptographic Usage Mask."""
EXPORT = 0x40
"""Of the same: some servers give no key out without it."""
RAW = 1
"""Key Format Type."""
UNINTERPRETED_TEXT_STRING = 1
"""Name Type."""
CESSATION_OF_OPERATION = 6
"""Revocation Reason Code."""
QUERY_OPERATIONS = 1
"""Query Function."""
