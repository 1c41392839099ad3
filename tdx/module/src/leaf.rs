//! Leaf numbers and names of both interfaces.

macro_rules! leaves {
    ($(#[$doc:meta])* $enum:ident { $($variant:ident = $value:literal, $name:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        #[repr(u16)]
        pub enum $enum {
            $(#[doc = concat!("`", $name, "`")] $variant = $value,)*
        }

        impl $enum {
            /// Every leaf this module implements.
            pub const ALL: &'static [$enum] = &[$($enum::$variant,)*];

            /// The leaf of a number (bits 15:0 of RAX), if it is implemented.
            #[must_use]
            pub const fn from_number(n: u16) -> Option<Self> {
                match n {
                    $($value => Some($enum::$variant),)*
                    _ => None,
                }
            }

            /// The name in the manuals.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $($enum::$variant => $name,)*
                }
            }

            /// The number in bits 15:0 of RAX.
            #[must_use]
            pub const fn number(self) -> u64 {
                self as u64
            }
        }
    };
}

leaves! {
    /// A SEAMCALL leaf (host side).
    HostLeaf {
        VpEnter = 0, "TDH.VP.ENTER";
        MngAddcx = 1, "TDH.MNG.ADDCX";
        MemPageAdd = 2, "TDH.MEM.PAGE.ADD";
        MemSeptAdd = 3, "TDH.MEM.SEPT.ADD";
        VpAddcx = 4, "TDH.VP.ADDCX";
        MemPageRelocate = 5, "TDH.MEM.PAGE.RELOCATE";
        MemPageAug = 6, "TDH.MEM.PAGE.AUG";
        MemRangeBlock = 7, "TDH.MEM.RANGE.BLOCK";
        MngKeyConfig = 8, "TDH.MNG.KEY.CONFIG";
        MngCreate = 9, "TDH.MNG.CREATE";
        VpCreate = 10, "TDH.VP.CREATE";
        MngRd = 11, "TDH.MNG.RD";
        MemRd = 12, "TDH.MEM.RD";
        MngWr = 13, "TDH.MNG.WR";
        MemWr = 14, "TDH.MEM.WR";
        MemPageDemote = 15, "TDH.MEM.PAGE.DEMOTE";
        MrExtend = 16, "TDH.MR.EXTEND";
        MrFinalize = 17, "TDH.MR.FINALIZE";
        VpFlush = 18, "TDH.VP.FLUSH";
        MngVpflushdone = 19, "TDH.MNG.VPFLUSHDONE";
        MngKeyFreeid = 20, "TDH.MNG.KEY.FREEID";
        MngInit = 21, "TDH.MNG.INIT";
        VpInit = 22, "TDH.VP.INIT";
        MemPagePromote = 23, "TDH.MEM.PAGE.PROMOTE";
        PhymemPageRdmd = 24, "TDH.PHYMEM.PAGE.RDMD";
        MemSeptRd = 25, "TDH.MEM.SEPT.RD";
        VpRd = 26, "TDH.VP.RD";
        MngKeyReclaimid = 27, "TDH.MNG.KEY.RECLAIMID";
        PhymemPageReclaim = 28, "TDH.PHYMEM.PAGE.RECLAIM";
        MemPageRemove = 29, "TDH.MEM.PAGE.REMOVE";
        MemSeptRemove = 30, "TDH.MEM.SEPT.REMOVE";
        SysKeyConfig = 31, "TDH.SYS.KEY.CONFIG";
        SysInfo = 32, "TDH.SYS.INFO";
        SysInit = 33, "TDH.SYS.INIT";
        SysRd = 34, "TDH.SYS.RD";
        SysLpInit = 35, "TDH.SYS.LP.INIT";
        SysTdmrInit = 36, "TDH.SYS.TDMR.INIT";
        SysRdall = 37, "TDH.SYS.RDALL";
        MemTrack = 38, "TDH.MEM.TRACK";
        MemRangeUnblock = 39, "TDH.MEM.RANGE.UNBLOCK";
        PhymemCacheWb = 40, "TDH.PHYMEM.CACHE.WB";
        PhymemPageWbinvd = 41, "TDH.PHYMEM.PAGE.WBINVD";
        VpWr = 43, "TDH.VP.WR";
        SysLpShutdown = 44, "TDH.SYS.LP.SHUTDOWN";
        SysConfig = 45, "TDH.SYS.CONFIG";
        ServtdBind = 48, "TDH.SERVTD.BIND";
        ServtdPrebind = 49, "TDH.SERVTD.PREBIND";
        SysShutdown = 52, "TDH.SYS.SHUTDOWN";
        SysUpdate = 53, "TDH.SYS.UPDATE";
        ExportAbort = 64, "TDH.EXPORT.ABORT";
        ExportBlockw = 65, "TDH.EXPORT.BLOCKW";
        ExportRestore = 66, "TDH.EXPORT.RESTORE";
        ExportMem = 68, "TDH.EXPORT.MEM";
        ExportPause = 70, "TDH.EXPORT.PAUSE";
        ExportTrack = 71, "TDH.EXPORT.TRACK";
        ExportStateImmutable = 72, "TDH.EXPORT.STATE.IMMUTABLE";
        ExportStateTd = 73, "TDH.EXPORT.STATE.TD";
        ExportStateVp = 74, "TDH.EXPORT.STATE.VP";
        ExportUnblockw = 75, "TDH.EXPORT.UNBLOCKW";
        ImportAbort = 80, "TDH.IMPORT.ABORT";
        ImportEnd = 81, "TDH.IMPORT.END";
        ImportCommit = 82, "TDH.IMPORT.COMMIT";
        ImportMem = 83, "TDH.IMPORT.MEM";
        ImportTrack = 84, "TDH.IMPORT.TRACK";
        ImportStateImmutable = 85, "TDH.IMPORT.STATE.IMMUTABLE";
        ImportStateTd = 86, "TDH.IMPORT.STATE.TD";
        ImportStateVp = 87, "TDH.IMPORT.STATE.VP";
        MigStreamCreate = 96, "TDH.MIG.STREAM.CREATE";
    }
}

leaves! {
    /// A TDCALL leaf (guest side).
    GuestLeaf {
        VpVmcall = 0, "TDG.VP.VMCALL";
        VpInfo = 1, "TDG.VP.INFO";
        MrRtmrExtend = 2, "TDG.MR.RTMR.EXTEND";
        VpVeinfoGet = 3, "TDG.VP.VEINFO.GET";
        MrReport = 4, "TDG.MR.REPORT";
        VpCpuidveSet = 5, "TDG.VP.CPUIDVE.SET";
        MemPageAccept = 6, "TDG.MEM.PAGE.ACCEPT";
        VmRd = 7, "TDG.VM.RD";
        VmWr = 8, "TDG.VM.WR";
        VpRd = 9, "TDG.VP.RD";
        VpWr = 10, "TDG.VP.WR";
        SysRd = 11, "TDG.SYS.RD";
        SysRdall = 12, "TDG.SYS.RDALL";
        ServtdRd = 18, "TDG.SERVTD.RD";
        ServtdWr = 20, "TDG.SERVTD.WR";
        MemPageAttrRd = 23, "TDG.MEM.PAGE.ATTR.RD";
        MemPageAttrWr = 24, "TDG.MEM.PAGE.ATTR.WR";
        VpEnter = 25, "TDG.VP.ENTER";
        VpInvept = 26, "TDG.VP.INVEPT";
        VpInvvpid = 27, "TDG.VP.INVVPID";
    }
}

impl HostLeaf {
    /// Leaves whose RAX may carry a version (bits 23:16).
    #[must_use]
    pub const fn is_versioned(n: u16) -> bool {
        matches!(n, 3 | 11 | 22 | 23 | 26 | 30)
    }

    /// Leaves that may be called before the module is ready.
    #[must_use]
    pub const fn is_allowed_before_ready(n: u16) -> bool {
        matches!(n, 31 | 32 | 33 | 34 | 35 | 37 | 44 | 45 | 53)
    }
}
