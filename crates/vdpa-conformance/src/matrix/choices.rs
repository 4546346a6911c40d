//! The table of design choices: places where the kernel has a quirk, or where the live-update series leaves a question open.

use std::fmt::Write as _;

/// A place where the kernel has a quirk or the series leaves a question open, and the behaviour that was chosen.
struct Choice {
    section: &'static str,
    what: &'static str,
    kernel: &'static str,
    here: &'static str,
    setting: &'static str,
}

const fn choice(
    section: &'static str,
    what: &'static str,
    kernel: &'static str,
    here: &'static str,
    setting: &'static str,
) -> Choice {
    Choice { section, what, kernel, here, setting }
}

const NOTES: &str = "
## Notes: quirks kept, quirks left

Where the kernel's behaviour is a quirk, or the live-update series leaves a question open. *Setting* names the attribute of
a device that chooses; a dash means that there is one behaviour only.

| Section | What | Linux 7.3, or the series as posted | Here | Setting |
|---|---|---|---|---|
";

const CHOICES: &[Choice] = &[
    choice(
        "1.1",
        "RESET_OWNER(0) by the owner",
        "EFAULT",
        "EFAULT; on: as close and open, and the file stays open",
        "`reset_owner off\\|on`",
    ),
    choice(
        "1.1",
        "SET_LOG_BASE, SET_LOG_FD, VHOST_F_LOG_ALL",
        "ENOTTY; not offered",
        "the same; on: as vhost-net",
        "`vhost_log off\\|on`",
    ),
    choice(
        "1.6a",
        "SET_MEM_TABLE",
        "stored, no effect",
        "checked, no effect; on: what address space 0 maps",
        "`mem_table off\\|on`",
    ),
    choice(
        "2.4",
        "UPDATE over several fragments, outside a batch",
        "`set_map` after every fragment",
        "one `set_map`",
        "–",
    ),
    choice(
        "2.4",
        "entries of an address space's IOTLB",
        "2048, a parameter of the module",
        "2048, or up to 1048576",
        "`max_iotlb_entries`",
    ),
    choice("2.6", "END when the device refuses the table", "success", "sims: success; blk: EFAULT", "–"),
    choice(
        "2.6, 8.5 R5",
        "END after a REMAP when the device refuses the table",
        "success",
        "EFAULT, and the REMAPs are taken back",
        "–",
    ),
    choice(
        "3.2",
        "a hole inside an UPDATE by owner addresses",
        "part of the next fragment, with a wrapped offset",
        "EFAULT",
        "–",
    ),
    choice(
        "3.2",
        "memory whose protection forbids what the permission allows, by owner addresses",
        "mapped; the access fails",
        "EFAULT",
        "–",
    ),
    choice(
        "3.2",
        "UPDATE at address 0 that fails at its first fragment",
        "empties the address space",
        "changes nothing",
        "–",
    ),
    choice(
        "3.3",
        "pages of a request that begins or ends inside a page",
        "whole pages, all charged",
        "sims with `use_va off`: the same; blk: charged by what is mapped",
        "–",
    ),
    choice(
        "3.3",
        "addresses with different offsets in their pages, pinned",
        "data is shifted",
        "sims with `use_va off`: the same; blk: not shifted",
        "–",
    ),
    choice(
        "3.3",
        "one UPDATE of pages that are not contiguous",
        "one entry per physical run",
        "one entry per mapping of the client",
        "–",
    ),
    choice(
        "3.3",
        "memory that only its process sees, pinned",
        "pinned and charged",
        "sims: charged, reached by copying; blk: reached by copying, not charged",
        "–",
    ),
    choice(
        "3.3, 8.4 N5",
        "limit on pinned pages",
        "soft RLIMIT_MEMLOCK of the caller",
        "the same",
        "blk: `memlock`",
    ),
    choice(
        "4.2",
        "an open while it is open",
        "EBUSY",
        "EBUSY; open: a device of its own, which takes over with DRIVER_OK",
        "blk: `handover off\\|open`",
    ),
    choice(
        "4.5",
        "a reset without IOTLB_PERSIST acknowledged",
        "simulators drop their table",
        "sims: dropped; blk: kept",
        "`compat_reset clean\\|keep`",
    ),
    choice(
        "4.5",
        "the table after that, until the next message that reaches the device",
        "whole tables: an empty batch brings it back; single mappings: it does not come back",
        "the same",
        "`batch_mapping on\\|off`",
    ),
    choice(
        "6.1",
        "addresses before the first mapping",
        "simulators pass them through to the owner",
        "sims with `use_va on`: the same; blk: nothing is mapped",
        "–",
    ),
    choice(
        "6.1",
        "a table beyond the simulator's own limit",
        "the simulator's table is empty, ENOSPC inside",
        "the same",
        "sims: `max_iotlb_entries`",
    ),
    choice(
        "6.1, 8.7",
        "status write with DRIVER_OK while suspended",
        "simulators run again",
        "sims: the same; blk: stays suspended",
        "–",
    ),
    choice("8.4 O1", "who may call NEW_OWNER", "whoever holds the descriptor", "the same", "–"),
    choice(
        "8.4 O2",
        "NEW_OWNER while the device runs",
        "allowed",
        "allowed; on: EBUSY",
        "blk: `strict_new_owner off\\|on`",
    ),
    choice("8.4 N1", "NEW_OWNER by the owner at its limit", "ENOMEM, its pages counted twice", "EBUSY", "–"),
    choice(
        "8.5 R1",
        "REMAP outside a batch",
        "the device is given the old address",
        "the new one; taken back when it refuses",
        "–",
    ),
    choice("8.5 R2", "what REMAP may name", "one fragment", "a whole UPDATE, or one fragment", "–"),
    choice("8.5 R3", "REMAP of pinned pages", "overwrites physical addresses", "EFAULT", "–"),
    choice(
        "8.5 R4",
        "other fragments at the new address",
        "old file and offset stay",
        "fragments are derived anew",
        "–",
    ),
    choice(
        "8.5 R7",
        "access between NEW_OWNER and REMAP",
        "the old address in the new address space",
        "as unmapped",
        "–",
    ),
    choice(
        "8.5",
        "REMAP to other memory",
        "not checked",
        "EFAULT; off: the other memory is mapped",
        "sims: `verify_remap on\\|off`",
    ),
    choice(
        "8.6",
        "NEW_OWNER and IOTLB_REMAP offered",
        "nowhere",
        "sims: both; with `use_va off` NEW_OWNER; with `batch_mapping off` neither; blk: NEW_OWNER",
        "`use_va`, `batch_mapping`",
    ),
    choice("8.6", "acknowledging one that is not offered", "accepted", "EOPNOTSUPP", "–"),
    choice(
        "8.8 O7",
        "a reset with NEW_OWNER and not IOTLB_PERSIST acknowledged",
        "drops the table",
        "keeps it",
        "–",
    ),
    choice("8.2 O3", "the numbers of the series", "none", "as posted, or others", "`vdpad --live-numbers`"),
];

/// Appends the table of choices, a section of docs/uapi.md.
pub(super) fn render(text: &mut String) {
    text.push_str(NOTES);
    for Choice { section, what, kernel, here, setting } in CHOICES {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {section} | {what} | {kernel} | {here} | {setting} |");
    }
}
