//! Leaf numbers of SEAMCALL and their names.

macro_rules! leaves {
    ($($variant:ident = $number:literal, $version:literal, $name:literal;)*) => {
        /// A host-side leaf that this back end calls (TDX module ABI, "Host-side (SEAMCALL)
        /// interface functions").
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        pub enum Leaf {
            $(#[doc = concat!("`", $name, "`")] $variant = $number,)*
        }

        impl Leaf {
            /// Every leaf that this back end calls.
            pub const ALL: &'static [Leaf] = &[$(Leaf::$variant,)*];

            /// The manuals' name, by which leaks and documents call it.
            pub const fn name(self) -> &'static str {
                match self { $(Leaf::$variant => $name,)* }
            }

            /// The words for a call that was not made.
            pub(crate) const fn not_called(self) -> &'static str {
                match self { $(Leaf::$variant => concat!($name, " was not called"),)* }
            }

            /// The version of the leaf that is called.
            pub const fn version(self) -> u8 {
                match self { $(Leaf::$variant => $version,)* }
            }
        }
    };
}

leaves! {
    VpEnter = 0, 0, "TDH.VP.ENTER";
    MngAddcx = 1, 0, "TDH.MNG.ADDCX";
    MemPageAdd = 2, 0, "TDH.MEM.PAGE.ADD";
    MemSeptAdd = 3, 0, "TDH.MEM.SEPT.ADD";
    VpAddcx = 4, 0, "TDH.VP.ADDCX";
    MemPageAug = 6, 0, "TDH.MEM.PAGE.AUG";
    MemRangeBlock = 7, 0, "TDH.MEM.RANGE.BLOCK";
    MngKeyConfig = 8, 0, "TDH.MNG.KEY.CONFIG";
    MngCreate = 9, 0, "TDH.MNG.CREATE";
    VpCreate = 10, 0, "TDH.VP.CREATE";
    MngRd = 11, 0, "TDH.MNG.RD";
    MemPageDemote = 15, 0, "TDH.MEM.PAGE.DEMOTE";
    MrExtend = 16, 0, "TDH.MR.EXTEND";
    MrFinalize = 17, 0, "TDH.MR.FINALIZE";
    VpFlush = 18, 0, "TDH.VP.FLUSH";
    MngVpflushdone = 19, 0, "TDH.MNG.VPFLUSHDONE";
    MngKeyFreeid = 20, 0, "TDH.MNG.KEY.FREEID";
    MngInit = 21, 0, "TDH.MNG.INIT";
    // Version 1 takes the vCPU's x2APIC id in R8.
    VpInit = 22, 1, "TDH.VP.INIT";
    MemPagePromote = 23, 0, "TDH.MEM.PAGE.PROMOTE";
    PhymemPageReclaim = 28, 0, "TDH.PHYMEM.PAGE.RECLAIM";
    MemPageRemove = 29, 0, "TDH.MEM.PAGE.REMOVE";
    MemSeptRemove = 30, 0, "TDH.MEM.SEPT.REMOVE";
    SysRd = 34, 0, "TDH.SYS.RD";
    MemTrack = 38, 0, "TDH.MEM.TRACK";
    MemRangeUnblock = 39, 0, "TDH.MEM.RANGE.UNBLOCK";
    PhymemCacheWb = 40, 0, "TDH.PHYMEM.CACHE.WB";
    PhymemPageWbinvd = 41, 0, "TDH.PHYMEM.PAGE.WBINVD";
    VpWr = 43, 0, "TDH.VP.WR";
    ServtdBind = 48, 0, "TDH.SERVTD.BIND";
    ServtdPrebind = 49, 0, "TDH.SERVTD.PREBIND";
    ExportAbort = 64, 0, "TDH.EXPORT.ABORT";
    ExportBlockw = 65, 0, "TDH.EXPORT.BLOCKW";
    ExportRestore = 66, 0, "TDH.EXPORT.RESTORE";
    ExportMem = 68, 0, "TDH.EXPORT.MEM";
    ExportPause = 70, 0, "TDH.EXPORT.PAUSE";
    ExportTrack = 71, 0, "TDH.EXPORT.TRACK";
    ExportStateImmutable = 72, 0, "TDH.EXPORT.STATE.IMMUTABLE";
    ExportStateTd = 73, 0, "TDH.EXPORT.STATE.TD";
    ExportStateVp = 74, 0, "TDH.EXPORT.STATE.VP";
    ExportUnblockw = 75, 0, "TDH.EXPORT.UNBLOCKW";
    ImportAbort = 80, 0, "TDH.IMPORT.ABORT";
    ImportEnd = 81, 0, "TDH.IMPORT.END";
    ImportCommit = 82, 0, "TDH.IMPORT.COMMIT";
    ImportMem = 83, 0, "TDH.IMPORT.MEM";
    ImportTrack = 84, 0, "TDH.IMPORT.TRACK";
    ImportStateImmutable = 85, 0, "TDH.IMPORT.STATE.IMMUTABLE";
    ImportStateTd = 86, 0, "TDH.IMPORT.STATE.TD";
    ImportStateVp = 87, 0, "TDH.IMPORT.STATE.VP";
    MigStreamCreate = 96, 0, "TDH.MIG.STREAM.CREATE";
}

impl Leaf {
    /// True if RCX is a guest-physical address, with the level of its entry in bits 2:0.
    pub(crate) const fn takes_gpa(self) -> bool {
        use Leaf::{
            ExportUnblockw, MemPageAdd, MemPageAug, MemPageDemote, MemPagePromote, MemPageRemove,
            MemRangeBlock, MemRangeUnblock, MemSeptAdd, MemSeptRemove, MrExtend,
        };
        matches!(
            self,
            MemPageAdd
                | MemPageAug
                | MemPageDemote
                | MemPagePromote
                | MemPageRemove
                | MemRangeBlock
                | MemRangeUnblock
                | MemSeptAdd
                | MemSeptRemove
                | MrExtend
                | ExportUnblockw
        )
    }

    /// True for a leaf of a migration. A failure of one ends the migration at most: the TD that it
    /// leaves runs on.
    pub(crate) const fn only_migrates(self) -> bool {
        let exports_or_imports =
            self as u16 >= Leaf::ExportAbort as u16 && self as u16 <= Leaf::ImportStateVp as u16;
        let prepares = matches!(
            self,
            Leaf::ServtdBind | Leaf::ServtdPrebind | Leaf::MigStreamCreate
        );
        // A page whose writes stay blocked stops the guest.
        prepares || exports_or_imports && !matches!(self, Leaf::ExportUnblockw)
    }

    /// RAX of a call: the leaf in bits 15:0, its version in bits 23:16.
    pub const fn rax(self) -> u64 {
        self as u64 | (self.version() as u64) << 16
    }
}
