//! What a protected vCPU or VM is answered without asking its technology.
//!
//! In Linux 62 of the 92 wrappers of `vmx/main.c` only give a TD a fixed answer. Here each such
//! operation is one row of a table, and the table generates both the methods
//! ([`protected_vcpu_answers!`](crate::protected_vcpu_answers),
//! [`protected_vm_answers!`](crate::protected_vm_answers)) and the data
//! ([`VCPU_ANSWERS`], [`VM_ANSWERS`]) that tests and docs/ops.md read. The operations that are no
//! methods here stand in [`MAIN_C`](crate::MAIN_C) with the reason.

/// How `main.c` answers an operation for a TD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Both back ends are called, in a fixed order.
    Both,
    /// The call goes to the TD's back end.
    Dispatch,
    /// Nothing happens.
    NoOp,
    /// A constant.
    Constant,
    /// The caller's structure is filled with zeros.
    ZeroFilled,
    /// The call is a bug of the caller: refused, and in Linux a warning.
    Refused,
}

impl Class {
    /// The letter by which tables call it.
    pub const fn letter(self) -> char {
        match self {
            Self::Both => 'B',
            Self::Dispatch => 'D',
            Self::NoOp => 'N',
            Self::Constant => 'C',
            Self::ZeroFilled => 'Z',
            Self::Refused => 'W',
        }
    }
}

/// One row: an operation of the traits whose answer for a protected VM is fixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedAnswer {
    /// The method.
    pub method: &'static str,
    /// How it answers.
    pub class: Class,
}

/// Turns the rows into one macro that writes the methods and one constant that lists them.
macro_rules! fixed_answers {
    (
        $(#[$macro_doc:meta])* macro $name:ident;
        $(#[$table_doc:meta])* const $TABLE:ident;
        $( $class:ident fn $method:ident $args:tt $(-> $ret:ty)? $body:block )*
    ) => {
        $(#[$macro_doc])*
        #[macro_export]
        macro_rules! $name {
            () => {
                $( #[inline] fn $method $args $(-> $ret)? $body )*
            };
        }

        $(#[$table_doc])*
        pub const $TABLE: &[FixedAnswer] = &[
            $( FixedAnswer { method: stringify!($method), class: Class::$class }, )*
        ];
    };
}

fixed_answers! {
    /// Writes the [`VcpuOps`](crate::VcpuOps) methods whose answer is fixed for a protected vCPU;
    /// for use inside its `impl VcpuOps`.
    macro protected_vcpu_answers;
    /// The methods that [`protected_vcpu_answers!`](crate::protected_vcpu_answers) writes.
    const VCPU_ANSWERS;

    NoOp fn set_cpuid(&mut self, _: &[::kvm_ops::CpuidEntry]) -> ::kvm_ops::Result<()> { Ok(()) }
    Constant fn set_efer(&mut self, _: u64) -> ::kvm_ops::Result<()> { Ok(()) }
    Constant fn get_segment_base(&self, _: ::kvm_ops::SegmentName) -> ::kvm_ops::Result<u64> { Ok(0) }
    ZeroFilled fn get_segment(&self, _: ::kvm_ops::SegmentName) -> ::kvm_ops::Result<::kvm_ops::Segment> {
        Ok(::core::default::Default::default())
    }
    NoOp fn set_segment(&mut self, _: ::kvm_ops::SegmentName, _: &::kvm_ops::Segment) -> ::kvm_ops::Result<()> { Ok(()) }
    Constant fn get_cpl(&self) -> ::kvm_ops::Result<u8> { Ok(0) }
    ZeroFilled fn get_cs_db_l_bits(&self) -> ::kvm_ops::Result<(bool, bool)> { Ok((false, false)) }
    Constant fn is_valid_cr0(&self, _: u64) -> bool { true }
    Constant fn is_valid_cr4(&self, _: u64) -> bool { true }
    NoOp fn set_cr0(&mut self, _: u64) -> ::kvm_ops::Result<()> { Ok(()) }
    NoOp fn set_cr4(&mut self, _: u64) -> ::kvm_ops::Result<()> { Ok(()) }
    ZeroFilled fn get_idt(&self) -> ::kvm_ops::Result<::kvm_ops::DescTable> { Ok(::core::default::Default::default()) }
    NoOp fn set_idt(&mut self, _: ::kvm_ops::DescTable) -> ::kvm_ops::Result<()> { Ok(()) }
    ZeroFilled fn get_gdt(&self) -> ::kvm_ops::Result<::kvm_ops::DescTable> { Ok(::core::default::Default::default()) }
    NoOp fn set_gdt(&mut self, _: ::kvm_ops::DescTable) -> ::kvm_ops::Result<()> { Ok(()) }
    NoOp fn set_dr7(&mut self, _: u64) -> ::kvm_ops::Result<()> { Ok(()) }
    Constant fn get_rflags(&self) -> ::kvm_ops::Result<u64> { Ok(0) }
    NoOp fn set_rflags(&mut self, _: u64) -> ::kvm_ops::Result<()> { Ok(()) }
    Constant fn get_if_flag(&self) -> ::kvm_ops::Result<bool> { Ok(false) }
    NoOp fn set_guest_debug(&mut self, _: bool, _: bool) -> ::kvm_ops::Result<()> { Ok(()) }
    NoOp fn inject_irq(&mut self, _: u8) -> ::kvm_ops::Result<()> { Ok(()) }
    NoOp fn inject_exception(&mut self, _: ::kvm_ops::Exception) -> ::kvm_ops::Result<()> { Ok(()) }
    NoOp fn cancel_injection(&mut self) -> ::kvm_ops::Result<()> { Ok(()) }
    Constant fn nmi_allowed(&self) -> ::kvm_ops::Result<bool> { Ok(true) }
    Constant fn get_nmi_mask(&self) -> ::kvm_ops::Result<bool> { Ok(false) }
    NoOp fn set_nmi_mask(&mut self, _: bool) -> ::kvm_ops::Result<()> { Ok(()) }
    NoOp fn enable_irq_window(&mut self) -> ::kvm_ops::Result<()> { Ok(()) }
    Constant fn get_interrupt_shadow(&self) -> ::kvm_ops::Result<u32> { Ok(0) }
    NoOp fn set_interrupt_shadow(&mut self, _: u32) -> ::kvm_ops::Result<()> { Ok(()) }
    NoOp fn write_tsc_offset(&mut self, _: u64) -> ::kvm_ops::Result<()> { Ok(()) }
    NoOp fn write_tsc_multiplier(&mut self, _: u32) -> ::kvm_ops::Result<()> { Ok(()) }
    NoOp fn setup_mce(&mut self, _: u64) -> ::kvm_ops::Result<()> { Ok(()) }
}

fixed_answers! {
    /// Writes the [`VmOps`](crate::VmOps) methods whose answer is fixed for a protected VM; for
    /// use inside its `impl VmOps`.
    macro protected_vm_answers;
    /// The methods that [`protected_vm_answers!`](crate::protected_vm_answers) writes.
    const VM_ANSWERS;

    Refused fn dirty_log(&self, _: &::kvm_ops::MemSlot, _: &mut [u64]) -> ::kvm_ops::Result<()> {
        ::kvm_ops::unsupported!("dirty_log")
    }
    Constant fn set_tss_addr(&self, _: ::kvm_ops::Gpa) -> ::kvm_ops::Result<()> { Ok(()) }
    Constant fn set_identity_map_addr(&self, _: ::kvm_ops::Gpa) -> ::kvm_ops::Result<()> { Ok(()) }
}
