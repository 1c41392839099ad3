//! A way to dispatch, and the loop that every one of them is measured in.

use crate::designs::fleet::VMS;

/// One way to send an operation to the technology of its VM.
pub trait Form {
    /// How one VM is kept in the fleet's array.
    type Vm;

    /// Creates the VM of that number, of the technology 0 VMX, 1 TDX, 2 SVM, 3 SEV.
    fn vm(tech: u8, id: u64) -> Self::Vm;

    /// Dispatches one operation.
    fn op(vm: &Self::Vm, index: u32) -> bool;
}

/// A fleet of VMs kept in one form.
pub type Vms<F> = Box<[<F as Form>::Vm; VMS]>;

/// Creates a fleet.
pub fn fleet<F: Form>(techs: &[u8; VMS]) -> Vms<F> {
    let vms: Vec<F::Vm> = techs
        .iter()
        .zip(0..)
        .map(|(&tech, id)| F::vm(tech, id))
        .collect();
    let Ok(vms) = vms.try_into() else {
        unreachable!("as many VMs as technologies")
    };
    vms
}

/// How many placements of each loop are measured.
pub const PLACEMENTS: usize = 4;

/// Visits the VMs in `order` and performs one operation on each.
///
/// A function of its own, because callgrind collects inside functions of this name only. The
/// rotation makes each answer matter and keeps the compiler from computing several at once.
///
/// `PLACEMENT` moves the loop by 16 bytes in its cache line. Where a branch falls in its line
/// decides whether many Intel processors keep it in their cache of decoded instructions (erratum
/// SKX102, "JCC erratum"), which is worth more than most differences between forms; so each form
/// is measured in all four places.
#[inline(never)]
pub fn counted_loop<F: Form, const PLACEMENT: usize>(vms: &[F::Vm; VMS], order: &[u8]) -> u64 {
    // SAFETY: it executes no more than some NOPs.
    unsafe {
        core::arch::asm!(
            ".p2align 6",
            ".skip 16 * {placement}, 0x90",
            placement = const PLACEMENT,
            options(nomem, nostack, preserves_flags)
        );
    }
    let mut sum = 0u64;
    let mut index = 0x8000_0000u32;
    for &vm in order {
        index = index.wrapping_add(0x0101_0101);
        sum = sum.rotate_left(1) ^ u64::from(F::op(&vms[usize::from(vm)], index));
    }
    sum
}

/// The loop with an operation of one instruction and no dispatch: what every count has in common.
#[derive(Debug)]
pub struct Empty;

/// How many instructions [`Empty`]'s operation has.
pub const EMPTY_OP: f64 = 1.0;

impl Form for Empty {
    type Vm = [u64; 5];

    fn vm(_: u8, id: u64) -> [u64; 5] {
        [id; 5]
    }

    #[inline(always)]
    #[allow(clippy::transmute_int_to_bool)] // A comparison would be an instruction.
    fn op(vm: &[u64; 5], index: u32) -> bool {
        let answer: u8;
        // SAFETY: it clears a register. The address and the argument are computed for it, as for
        // an operation. Zero is a `bool`.
        unsafe {
            core::arch::asm!(
                "xor {answer}, {answer} /* {vm} {index:e} */",
                answer = lateout(reg_byte) answer,
                vm = in(reg) vm,
                index = in(reg) index,
                options(pure, readonly, nostack)
            );
            core::mem::transmute::<u8, bool>(answer)
        }
    }
}

/// A form whose dispatch and bodies are one function, which every call site shares: what the
/// compiler makes of operations that are too large to be copied.
#[derive(Debug)]
pub struct Outlined<F>(core::marker::PhantomData<F>);

impl<F: Form> Form for Outlined<F> {
    type Vm = F::Vm;

    fn vm(tech: u8, id: u64) -> F::Vm {
        F::vm(tech, id)
    }

    #[inline(always)]
    fn op(vm: &F::Vm, index: u32) -> bool {
        outlined_op::<F>(vm, index)
    }
}

#[inline(never)]
fn outlined_op<F: Form>(vm: &F::Vm, index: u32) -> bool {
    F::op(vm, index)
}
