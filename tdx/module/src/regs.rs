//! The general-purpose registers of a call.

/// The sixteen general-purpose registers, as SEAMCALL, TDCALL and VP.ENTER pass them.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)] // the fields are the registers
pub struct Regs {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
}

/// Register names in encoding order (RAX is 0, R15 is 15).
pub const REGISTER_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

impl Regs {
    /// Registers for a call of `leaf`, all else 0.
    #[must_use]
    pub fn leaf(leaf: u64) -> Self {
        Regs {
            rax: leaf,
            ..Regs::default()
        }
    }

    /// The registers in encoding order.
    #[must_use]
    pub const fn to_array(self) -> [u64; 16] {
        [
            self.rax, self.rcx, self.rdx, self.rbx, self.rsp, self.rbp, self.rsi, self.rdi,
            self.r8, self.r9, self.r10, self.r11, self.r12, self.r13, self.r14, self.r15,
        ]
    }

    /// The reverse of [`Regs::to_array`].
    #[must_use]
    pub const fn from_array(a: [u64; 16]) -> Self {
        let [
            rax,
            rcx,
            rdx,
            rbx,
            rsp,
            rbp,
            rsi,
            rdi,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
        ] = a;
        Regs {
            rax,
            rcx,
            rdx,
            rbx,
            rsp,
            rbp,
            rsi,
            rdi,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
        }
    }
}

impl core::fmt::Debug for Regs {
    /// RAX and the registers that are not 0.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let mut map = f.debug_map();
        for (i, (name, value)) in REGISTER_NAMES.iter().zip(self.to_array()).enumerate() {
            if i == 0 || value != 0 {
                map.entry(&format_args!("{name}"), &format_args!("{value:#x}"));
            }
        }
        map.finish()
    }
}
