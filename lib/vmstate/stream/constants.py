"""Numbers of QEMU's migration stream, under QEMU's own names (migration/savevm.h, migration/ram.c; 7.2 to 10.x).

All integers in the stream are big-endian.
"""

import struct

MAGIC = b"QEVM"
VERSION = 3

# migration/savevm.h
QEMU_VM_EOF = 0x00
QEMU_VM_SECTION_START = 0x01
QEMU_VM_SECTION_PART = 0x02
QEMU_VM_SECTION_END = 0x03
QEMU_VM_SECTION_FULL = 0x04
QEMU_VM_SUBSECTION = 0x05
QEMU_VM_VMDESCRIPTION = 0x06
QEMU_VM_CONFIGURATION = 0x07
QEMU_VM_COMMAND = 0x08
QEMU_VM_SECTION_FOOTER = 0x7E

# migration/savevm.c, enum qemu_vm_cmd
MIG_CMD_OPEN_RETURN_PATH = 1
MIG_CMD_PING = 2
MIG_CMD_POSTCOPY_ADVISE = 3
MIG_CMD_POSTCOPY_LISTEN = 4
MIG_CMD_POSTCOPY_RUN = 5
MIG_CMD_POSTCOPY_RAM_DISCARD = 6
MIG_CMD_PACKAGED = 7
MIG_CMD_ENABLE_COLO = 8
MIG_CMD_POSTCOPY_RESUME = 9
MIG_CMD_RECV_BITMAP = 10
MIG_CMD_SWITCHOVER_START = 11
# What may follow the header of a command, least and most; savevm.c, mig_cmd_args
COMMAND_SIZES = {
    MIG_CMD_OPEN_RETURN_PATH: (0, 0),
    MIG_CMD_PING: (4, 4),
    MIG_CMD_POSTCOPY_ADVISE: (0, 16),
    MIG_CMD_POSTCOPY_LISTEN: (0, 0),
    MIG_CMD_POSTCOPY_RUN: (0, 0),
    MIG_CMD_POSTCOPY_RAM_DISCARD: (3, 0xFFFF),
    MIG_CMD_PACKAGED: (4, 4),
    MIG_CMD_POSTCOPY_RESUME: (0, 0),
    MIG_CMD_RECV_BITMAP: (2, 256),
    MIG_CMD_ENABLE_COLO: (0, 0),
    MIG_CMD_SWITCHOVER_START: (0, 0),
}
# savevm.c, MAX_VM_CMD_PACKAGED_SIZE
PACKAGE_LIMIT = 1 << 25

# migration/migration.h, enum mig_rp_message_type
MIG_RP_MSG_SHUT = 1
MIG_RP_MSG_PONG = 2
MIG_RP_MSG_REQ_PAGES_ID = 3
MIG_RP_MSG_REQ_PAGES = 4
MIG_RP_MSG_RECV_BITMAP = 5
MIG_RP_MSG_RESUME_ACK = 6

# migration/ram.c; the rest of the word is an offset in the block
RAM_SAVE_FLAG_ZERO = 0x002
RAM_SAVE_FLAG_MEM_SIZE = 0x004
RAM_SAVE_FLAG_PAGE = 0x008
RAM_SAVE_FLAG_EOS = 0x010
RAM_SAVE_FLAG_CONTINUE = 0x020
RAM_SAVE_FLAG_XBZRLE = 0x040
RAM_SAVE_FLAG_HOOK = 0x080
RAM_SAVE_FLAG_COMPRESS_PAGE = 0x100
RAM_SAVE_FLAG_MULTIFD_FLUSH = 0x200
# Of all machines but those whose configuration names another size (target-page-bits)
PAGE_BITS = 12
ENCODING_FLAG_XBZRLE = 1

# migration/block-dirty-bitmap.c
DIRTY_BITMAP_EOS = 0x01
DIRTY_BITMAP_ZEROES = 0x02
DIRTY_BITMAP_NAME = 0x04
DIRTY_BITMAP_NODE = 0x08
DIRTY_BITMAP_START = 0x10
DIRTY_BITMAP_COMPLETE = 0x20
DIRTY_BITMAP_BITS = 0x40

U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")
COMMAND = struct.Struct(">BHH")  # tag, command, length of what follows
SECTION = struct.Struct(">BI")  # tag, section id
SHUT = struct.Struct(">HHI")  # message, length, status
FOOTER = SECTION
# The description behind the end mark: EOF tag, VMDESCRIPTION tag, length of the JSON
END = struct.Struct(">BBI")
