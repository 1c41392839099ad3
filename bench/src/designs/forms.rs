// The forms, written once and included for each kind of back end. `bodies` is in scope.

use core::mem::transmute;
use core::sync::atomic::{AtomicPtr, Ordering};

use kvm_ops_core::VmOps;

use crate::designs::form::Form;
use crate::designs::retpoline::{self, Op};
use bodies::{Amd, Chain, ChainRest, Flat, Intel, Nested, One, SevVm, SvmVm, TdxVm, VmxVm};

/// The technology is known at compile time.
#[derive(Debug)]
pub struct Direct;

impl Form for Direct {
    type Vm = VmxVm;

    fn vm(_: u8, id: u64) -> VmxVm {
        VmxVm::new(id)
    }

    #[inline(always)]
    fn op(vm: &VmxVm, index: u32) -> bool {
        vm.has_emulated_msr(index)
    }
}

/// Defines a form that stores its VMs as enum values.
macro_rules! enum_form {
    ($(#[$doc:meta])* $Form:ident, $Vm:ty, $($tech:pat => $make:expr),+) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $Form;

        impl Form for $Form {
            type Vm = $Vm;

            fn vm(tech: u8, id: u64) -> $Vm {
                match tech {
                    $($tech => $make(id),)+
                }
            }

            #[inline(always)]
            fn op(vm: &$Vm, index: u32) -> bool {
                vm.has_emulated_msr(index)
            }
        }
    };
}

enum_form!(
    /// `backend_enum!` with one back end.
    Enum1, One, _ => |id| One::Vmx(VmxVm::new(id))
);
enum_form!(
    /// `backend_enum!` with the two back ends of an Intel host.
    Enum2, Intel, 0 => |id| Intel::Vmx(VmxVm::new(id)), _ => |id| Intel::Tdx(TdxVm::new(id))
);
enum_form!(
    /// `backend_enum!` with four back ends side by side.
    Enum4, Flat,
    0 => |id| Flat::Vmx(VmxVm::new(id)), 1 => |id| Flat::Tdx(TdxVm::new(id)),
    2 => |id| Flat::Svm(SvmVm::new(id)), _ => |id| Flat::Sev(SevVm::new(id))
);
enum_form!(
    /// `backend_enum!` of two enums: vendor, then technology.
    Enum2x2, Nested,
    0 => |id| Nested::Intel(Intel::Vmx(VmxVm::new(id))),
    1 => |id| Nested::Intel(Intel::Tdx(TdxVm::new(id))),
    2 => |id| Nested::Amd(Amd::Svm(SvmVm::new(id))),
    _ => |id| Nested::Amd(Amd::Sev(SevVm::new(id)))
);
enum_form!(
    /// The same, with each VM in a separate allocation, as Linux allocates `struct kvm`.
    Enum2x2Boxed, Box<Nested>, tech => |id| Box::new(Enum2x2::vm(tech, id))
);
enum_form!(
    /// `backend_enum!` of nested enums: one technology, or the rest.
    EnumChain, Chain,
    0 => |id| Chain::Vmx(VmxVm::new(id)),
    1 => |id| Chain::Rest(ChainRest::Tdx(TdxVm::new(id))),
    2 => |id| Chain::Rest(ChainRest::Rest(Amd::Svm(SvmVm::new(id)))),
    _ => |id| Chain::Rest(ChainRest::Rest(Amd::Sev(SevVm::new(id))))
);

/// An enum with tags too far apart for a jump table, and a hand-written `match`.
///
/// enum_dispatch drops discriminants, so `backend_enum!` cannot express this.
#[repr(u8)]
#[derive(Debug)]
pub enum Sparse {
    /// The tag 0.
    Vmx(VmxVm) = 0,
    /// The tag 85.
    Tdx(TdxVm) = 85,
    /// The tag 171.
    Svm(SvmVm) = 171,
    /// The tag 255.
    Sev(SevVm) = 255,
}

/// The form of [`Sparse`].
#[derive(Debug)]
pub struct EnumSparse;

impl Form for EnumSparse {
    type Vm = Sparse;

    fn vm(tech: u8, id: u64) -> Sparse {
        match tech {
            0 => Sparse::Vmx(VmxVm::new(id)),
            1 => Sparse::Tdx(TdxVm::new(id)),
            2 => Sparse::Svm(SvmVm::new(id)),
            _ => Sparse::Sev(SevVm::new(id)),
        }
    }

    #[inline(always)]
    fn op(vm: &Sparse, index: u32) -> bool {
        match vm {
            Sparse::Vmx(vm) => vm.has_emulated_msr(index),
            Sparse::Tdx(vm) => vm.has_emulated_msr(index),
            Sparse::Svm(vm) => vm.has_emulated_msr(index),
            Sparse::Sev(vm) => vm.has_emulated_msr(index),
        }
    }
}

/// `Box<dyn VmOps>`: a trait object of the same trait.
#[derive(Debug)]
pub struct BoxDyn;

impl Form for BoxDyn {
    type Vm = Box<dyn VmOps>;

    fn vm(tech: u8, id: u64) -> Box<dyn VmOps> {
        match tech {
            0 => Box::new(VmxVm::new(id)),
            1 => Box::new(TdxVm::new(id)),
            2 => Box::new(SvmVm::new(id)),
            _ => Box::new(SevVm::new(id)),
        }
    }

    #[inline(always)]
    fn op(vm: &Box<dyn VmOps>, index: u32) -> bool {
        vm.has_emulated_msr(index)
    }
}

/// The operations of one technology as function pointers, like `kvm_x86_ops`.
#[derive(Debug)]
pub struct Ops {
    has_emulated_msr: Op,
}

macro_rules! table {
    ($TABLE:ident, $function:ident, $Vm:ty) => {
        unsafe extern "C" fn $function(vm: *const (), index: u32) -> bool {
            // SAFETY: a table is only ever stored with VMs of its type.
            unsafe { &*vm.cast::<$Vm>() }.answer(index)
        }
        static $TABLE: Ops = Ops { has_emulated_msr: $function };
    };
}
table!(VMX_OPS, vmx_has_emulated_msr, VmxVm);
table!(TDX_OPS, tdx_has_emulated_msr, TdxVm);
table!(SVM_OPS, svm_has_emulated_msr, SvmVm);
table!(SEV_OPS, sev_has_emulated_msr, SevVm);

static TABLES: [&Ops; 4] = [&VMX_OPS, &TDX_OPS, &SVM_OPS, &SEV_OPS];

/// A VM with a pointer to its table, in a separate allocation.
#[derive(Debug)]
pub struct TableVm {
    ops: &'static Ops,
    data: *const (),
}

/// Allocates a VM. The benchmark never frees one.
fn leaked(tech: u8, id: u64) -> *const () {
    match tech {
        0 => Box::into_raw(Box::new(VmxVm::new(id))).cast(),
        1 => Box::into_raw(Box::new(TdxVm::new(id))).cast(),
        2 => Box::into_raw(Box::new(SvmVm::new(id))).cast(),
        _ => Box::into_raw(Box::new(SevVm::new(id))).cast(),
    }
}

/// A function table for each VM: the "per-VM kvm_x86_ops" of the design discussion.
#[derive(Debug)]
pub struct PerVmTable<const RETPOLINE: bool>;

impl<const RETPOLINE: bool> Form for PerVmTable<RETPOLINE> {
    type Vm = TableVm;

    fn vm(tech: u8, id: u64) -> TableVm {
        TableVm { ops: TABLES[usize::from(tech)], data: leaked(tech, id) }
    }

    #[inline(always)]
    fn op(vm: &TableVm, index: u32) -> bool {
        let op = vm.ops.has_emulated_msr;
        // SAFETY: the table is that of the VM's technology.
        unsafe {
            if RETPOLINE { retpoline::call(op, vm.data, index) } else { op(vm.data, index) }
        }
    }
}

/// A VM with its technology's number.
#[derive(Debug)]
pub struct TagVm {
    tech: u8,
    data: *const (),
}

static OPS_BY_TAG: [Op; 4] =
    [vmx_has_emulated_msr, tdx_has_emulated_msr, svm_has_emulated_msr, sev_has_emulated_msr];

/// A static function table for each operation, indexed by the VM's technology.
#[derive(Debug)]
pub struct TagTable<const RETPOLINE: bool>;

impl<const RETPOLINE: bool> Form for TagTable<RETPOLINE> {
    type Vm = TagVm;

    fn vm(tech: u8, id: u64) -> TagVm {
        TagVm { tech, data: leaked(tech, id) }
    }

    #[inline(always)]
    fn op(vm: &TagVm, index: u32) -> bool {
        let op = OPS_BY_TAG[usize::from(vm.tech & 3)];
        // SAFETY: the function is that of the VM's technology.
        unsafe {
            if RETPOLINE { retpoline::call(op, vm.data, index) } else { op(vm.data, index) }
        }
    }
}

/// The wrapper of main.c: "if it is a TD then tdx, else vmx".
#[inline(never)]
unsafe extern "C" fn vt_has_emulated_msr(vm: *const (), index: u32) -> bool {
    // SAFETY: called only for VMs of type `Intel`.
    unsafe { &*vm.cast::<Intel>() }.has_emulated_msr(index)
}

/// The one global table. The pointer is mutable, as the module fills it at run time, so that the
/// compiler cannot see through it.
static GLOBAL: AtomicPtr<()> = AtomicPtr::new(vt_has_emulated_msr as *mut ());

#[inline(always)]
fn global(from: &AtomicPtr<()>) -> Op {
    // SAFETY: only functions of type `Op` are stored.
    unsafe { transmute::<*mut (), Op>(from.load(Ordering::Relaxed)) }
}

/// A global table of wrappers that test `is_td`: Linux's `vmx/main.c` without static calls.
#[derive(Debug)]
pub struct MainC<const RETPOLINE: bool>;

impl<const RETPOLINE: bool> Form for MainC<RETPOLINE> {
    type Vm = Intel;

    fn vm(tech: u8, id: u64) -> Intel {
        Enum2::vm(tech, id)
    }

    #[inline(always)]
    fn op(vm: &Intel, index: u32) -> bool {
        let (op, vm) = (global(&GLOBAL), core::ptr::from_ref(vm).cast());
        // SAFETY: the VM is of type `Intel`, as the wrapper requires.
        unsafe {
            if RETPOLINE { retpoline::call(op, vm, index) } else { op(vm, index) }
        }
    }
}

/// The same with Linux's static calls: the caller contains the wrapper's address.
#[derive(Debug)]
pub struct MainCStatic;

impl Form for MainCStatic {
    type Vm = Intel;

    fn vm(tech: u8, id: u64) -> Intel {
        Enum2::vm(tech, id)
    }

    #[inline(always)]
    fn op(vm: &Intel, index: u32) -> bool {
        // SAFETY: the VM is of type `Intel`, as the wrapper requires.
        unsafe { vt_has_emulated_msr(core::ptr::from_ref(vm).cast(), index) }
    }
}

/// The wrapper of the extra layer, which calls through the VM's table.
#[inline(never)]
unsafe extern "C" fn layer_has_emulated_msr<const RETPOLINE: bool>(
    vm: *const (),
    index: u32,
) -> bool {
    // SAFETY: called only for VMs of type `TableVm`.
    PerVmTable::<RETPOLINE>::op(unsafe { &*vm.cast::<TableVm>() }, index)
}

static LAYER: AtomicPtr<()> = AtomicPtr::new(layer_has_emulated_msr::<false> as *mut ());
static LAYER_RETPOLINE: AtomicPtr<()> = AtomicPtr::new(layer_has_emulated_msr::<true> as *mut ());

/// A second layer of callbacks below the global table, which the design discussion names and
/// rejects.
#[derive(Debug)]
pub struct Layer<const RETPOLINE: bool>;

impl<const RETPOLINE: bool> Form for Layer<RETPOLINE> {
    type Vm = TableVm;

    fn vm(tech: u8, id: u64) -> TableVm {
        PerVmTable::<RETPOLINE>::vm(tech, id)
    }

    #[inline(always)]
    fn op(vm: &TableVm, index: u32) -> bool {
        let op = global(if RETPOLINE { &LAYER_RETPOLINE } else { &LAYER });
        let vm = core::ptr::from_ref(vm).cast();
        // SAFETY: the VM is of type `TableVm`, as the layer requires.
        unsafe {
            if RETPOLINE { retpoline::call(op, vm, index) } else { op(vm, index) }
        }
    }
}
