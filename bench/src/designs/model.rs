//! The back ends behind the dispatch.
//!
//! There are four technologies, each in two kinds: *inlined*, with an operation that the compiler
//! may inline, and *called*, with an operation in a separate function, like the larger operations
//! of a real back end. They implement the real [`VmOps`]. The measured operation is
//! [`has_emulated_msr`](kvm_ops_core::VmOps::has_emulated_msr), because a body of three
//! instructions does not hide the dispatch. The bodies differ; otherwise the compiler would merge
//! the arms of the `match` and remove the dispatch.

use std::marker::PhantomData;

use kvm_ops_core::{
    Arc, Backend, Drained, Error, Exit, FreeReport, KeyReleased, Kick, Life, MemSlot, Result, Step,
    Tech, VcpuId, VcpuOps, VmId, VmOps,
};

/// The state of a benchmark VM: 40 bytes, of which an operation reads eight.
#[derive(Debug)]
pub struct State {
    id: VmId,
    base: u32,
    limit: u32,
    life: Box<Life>,
    _rest: [u64; 2],
}

impl State {
    fn new(id: u64, tech: Tech) -> Self {
        // Spread over the arguments of the loop, so that both answers occur.
        let base = (id as u32).wrapping_mul(0x9e37_79b9);
        Self {
            id: VmId(id),
            base,
            limit: base | 0x4000_0000,
            life: Box::new(Life::new(VmId(id), tech)),
            _rest: [0; 2],
        }
    }
}

macro_rules! back_end {
    ($(#[$doc:meta])* $Vm:ident, $tech:expr, $inline:meta, |$state:ident, $index:ident| $body:expr) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $Vm(State);

        impl $Vm {
            /// Creates VM number `id`.
            pub fn new(id: u64) -> Self {
                Self(State::new(id, $tech))
            }

            /// The operation, inlined into the trait's method and into a table's function.
            #[inline(always)]
            pub fn answer(&self, $index: u32) -> bool {
                let $state = &self.0;
                $body
            }
        }

        impl VmOps for $Vm {
            fn tech(&self) -> Tech {
                $tech
            }

            fn id(&self) -> VmId {
                self.0.id
            }

            fn step(&self) -> Step {
                self.0.life.step()
            }

            fn vm_init(&mut self) -> Result<()> {
                self.0.life.advance(Step::Initialized)
            }

            fn vm_finalize(&mut self) -> Result<()> {
                self.0.life.advance(Step::Runnable)
            }

            fn mmu_release_hkid(&mut self) -> Result<KeyReleased> {
                Ok(self.0.life.release_without_key())
            }

            fn drain_private(
                &mut self,
                released: KeyReleased,
            ) -> Result<Drained, (Error, KeyReleased)> {
                self.0.life.drain_without_private_pages(released)
            }

            fn vm_free(self, _: Drained) -> FreeReport {
                FreeReport::new(self.0.id, self.tech())
            }

            fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
                slot.last().map(drop)
            }

            fn delete_memory_slot(&self, _: &MemSlot) -> Result<()> {
                Ok(())
            }

            #[$inline]
            fn has_emulated_msr(&self, index: u32) -> bool {
                self.answer(index)
            }
        }

        impl Backend for $Vm {
            type Vcpu = Vcpu<$Vm>;

            fn create_vcpu(&self, id: VcpuId) -> Result<Self::Vcpu> {
                Ok(Vcpu(id, PhantomData))
            }
        }
    };
}

macro_rules! technologies {
    ($inline:meta) => {
        back_end!(
            /// The model of a normal VM on Intel.
            VmxVm, Tech::Vmx, $inline, |vm, index| index.wrapping_sub(vm.base) < vm.limit
        );
        back_end!(
            /// The model of a TD.
            TdxVm, Tech::Tdx, $inline, |vm, index| index & vm.limit > vm.base
        );
        back_end!(
            /// The model of a normal VM on AMD.
            SvmVm, Tech::Svm, $inline, |vm, index| index ^ vm.base < vm.limit
        );
        back_end!(
            /// The model of an SEV guest.
            SevVm, Tech::Sev, $inline, |vm, index| index | vm.base > vm.limit
        );
    };
}

/// Back ends whose operation may be inlined.
pub mod inlined {
    use super::*;
    technologies!(inline);
}

/// Back ends whose operation is a separate function.
pub mod called {
    use super::*;
    technologies!(inline(never));
}

/// The vCPU of a benchmark back end, which shuts down at once.
#[derive(Debug)]
pub struct Vcpu<V>(VcpuId, PhantomData<fn() -> V>);

struct NoKick;

impl Kick for NoKick {
    fn kick(&self) {}
}

impl<V> VcpuOps for Vcpu<V> {
    fn id(&self) -> VcpuId {
        self.0
    }

    fn vcpu_run(&mut self) -> Result<Exit> {
        Ok(Exit::Shutdown)
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::new(NoKick)
    }

    fn vcpu_reset(&mut self, _: bool) -> Result<()> {
        Ok(())
    }

    fn vcpu_free(self) -> Result<()> {
        Ok(())
    }
}
