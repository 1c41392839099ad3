//! Statuses that no committed transcript has, and that tests of this crate reach.

// Each test file uses a part; the module is no interface.
#![allow(dead_code, unreachable_pub)]

/// Basic reasons of exits of an L2 VM that go to L1, or first to a debugger who asked for them.
pub const DEBUGGED_EXITS: [u16; 21] = [
    2, 8, 9, 12, 13, 15, 16, 39, 47, 50, 51, 54, 57, 58, 59, 60, 61, 64, 67, 68, 70,
];

/// What a debugger is told of them: bit of L2_DEBUG_CTLS, status.
pub const DEBUGGED: [(u64, &str); 2] = [
    (1 << 2, "TDX_TD_EXIT_ON_L2_VM_EXIT"),
    (1 << 1, "TDX_TD_EXIT_ON_L2_TO_L1"),
];

/// Statuses of single calls: leaf, status, file of the test.
pub const SINGLE: [(&str, &str, &str); 2] = [
    (
        "TDG.VP.VMCALL",
        "TDX_TD_EXIT_ON_L2_TO_L1|EXIT:77",
        "l2_vms.rs",
    ),
    (
        "TDH.MEM.RANGE.UNBLOCK",
        "TDX_TLB_TRACKING_NOT_DONE|0x1",
        "migration.rs",
    ),
];

/// What TDH.SYS.INFO answers: RCX, RDX, R8 and R9 for a buffer of a page, and the status.
pub const SYS_INFO: [([u64; 4], &str); 11] = [
    ([0, 1024, 2048, 32], "TDX_SUCCESS"),
    ([1024, 4096, 512, 64], "TDX_SUCCESS"),
    // Both buffers are aligned, and named without a private KeyID.
    ([512, 1024, 2048, 32], "TDX_OPERAND_INVALID|RCX"),
    ([1 << 51, 1024, 2048, 32], "TDX_OPERAND_INVALID|RCX"),
    ([0, 1023, 2048, 32], "TDX_OPERAND_INVALID|RDX"),
    ([0, 0, 2048, 32], "TDX_OPERAND_INVALID|RDX"),
    ([0, 1024, 2048 + 256, 32], "TDX_OPERAND_INVALID|R8"),
    ([0, 1024, 1 << 51, 32], "TDX_OPERAND_INVALID|R8"),
    ([0, 1024, 2048, 31], "TDX_OPERAND_INVALID|R9"),
    ([0, 1024, 2048, 0], "TDX_OPERAND_INVALID|R9"),
    // The first that is wrong is blamed.
    ([512, 0, 2048 + 256, 0], "TDX_OPERAND_INVALID|RCX"),
];

/// What calls of a migration answer to a wrong operand, or to a lock that is held.
pub const MIGRATION: [(&str, &str); 19] = [
    ("TDH.EXPORT.MEM", "TDX_OPERAND_INVALID|RCX"),
    ("TDH.EXPORT.MEM", "TDX_OPERAND_INVALID|R8"),
    ("TDH.EXPORT.MEM", "TDX_OPERAND_INVALID|R9"),
    ("TDH.EXPORT.MEM", "TDX_OPERAND_INVALID|R11"),
    ("TDH.EXPORT.MEM", "TDX_OPERAND_INVALID|97"),
    ("TDH.EXPORT.MEM", "TDX_OPERAND_INVALID|98"),
    ("TDH.EXPORT.MEM", "TDX_PAGE_METADATA_INCORRECT|RDX"),
    ("TDH.EXPORT.MEM", "TDX_OPERAND_BUSY|SEPT_TREE"),
    ("TDH.EXPORT.MEM", "TDX_OPERAND_BUSY|173"),
    ("TDH.EXPORT.TRACK", "TDX_OPERAND_INVALID|RCX"),
    ("TDH.EXPORT.TRACK", "TDX_OPERAND_BUSY|173"),
    ("TDH.EXPORT.BLOCKW", "TDX_OPERAND_INVALID|RCX"),
    ("TDH.EXPORT.BLOCKW", "TDX_OPERAND_INVALID|97"),
    ("TDH.EXPORT.BLOCKW", "TDX_OPERAND_BUSY|SEPT_TREE"),
    ("TDH.EXPORT.UNBLOCKW", "TDX_OPERAND_INVALID|RCX"),
    ("TDH.EXPORT.UNBLOCKW", "TDX_OPERAND_INVALID|RDX"),
    ("TDH.EXPORT.UNBLOCKW", "TDX_OPERAND_BUSY|SEPT_TREE"),
    ("TDH.EXPORT.UNBLOCKW", "TDX_OPERAND_BUSY|RCX"),
    ("TDH.IMPORT.TRACK", "TDX_OPERAND_INVALID|RCX"),
];

/// The file of the tests that reach a status of a leaf, both named as in coverage.csv.
pub fn reached_by(leaf: &str, status: &str) -> Option<&'static str> {
    let debugged = DEBUGGED_EXITS.iter().any(|reason| {
        let told = |(_, name): &(u64, &str)| status == format!("{name}|EXIT:{reason}");
        leaf == format!("VMEXIT.{reason}") && DEBUGGED.iter().any(told)
    });
    let single = SINGLE
        .iter()
        .find(|single| (single.0, single.1) == (leaf, status));
    let sys_info = SYS_INFO.iter().any(|(_, name)| *name == status);
    match leaf {
        "TDH.SYS.INFO" => sys_info.then_some("metadata.rs"),
        _ if MIGRATION.contains(&(leaf, status)) => Some("migration.rs"),
        _ if debugged => Some("l2_vms.rs"),
        _ => single.map(|(_, _, file)| *file),
    }
}
