//! A form of dispatch, and the loop that measures it.

use crate::designs::fleet::VMS;

/// One way to dispatch an operation to the technology of its VM.
pub trait Form {
    /// The fleet array's element for one VM.
    type Vm;

    /// Creates VM number `id` of a technology: 0 VMX, 1 TDX, 2 SVM, 3 SEV.
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

/// The number of measured placements of each loop.
pub const PLACEMENTS: usize = 4;

/// Visits the VMs in `order` and performs one operation on each.
///
/// This is a separate function because callgrind collects only inside functions of this name. The
/// rotation makes each answer matter, and prevents the compiler from computing several at once.
///
/// `PLACEMENT` moves the loop by 16 bytes in its cache line. On many Intel processors the position
/// of a branch in its line decides if it stays in the cache of decoded instructions (erratum
/// SKX102, "JCC erratum"). This effect exceeds most differences between forms, so each form is
/// measured in all four positions.
#[inline(never)]
pub fn counted_loop<F: Form, const PLACEMENT: usize>(vms: &[F::Vm; VMS], order: &[u8]) -> u64 {
    // SAFETY: it executes only NOPs.
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

/// The loop with an operation of one instruction and no dispatch: the baseline of every count.
#[derive(Debug)]
pub struct Empty;

/// The number of instructions in [`Empty`]'s operation.
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
        // SAFETY: it clears a register, and zero is a valid `bool`. The address and the argument
        // are computed as for an operation.
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

/// A form with dispatch and bodies in one function that every call site shares. The compiler does
/// the same with operations that are too large to inline.
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
