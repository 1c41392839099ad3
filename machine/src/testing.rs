//! A host for tests: vCPUs exit as they are told, registers are kept, any operation can be made to
//! fail, and what is alive is counted.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use kvm_ops::guest::GuestProgram;
use kvm_ops::{
    CpuId, Error, Exit, Gpa, Host, Kick, MemSlot, NoPort, OpName, Privacy, Programs, Regs, Result,
    Runs, Sregs, Tech, VcpuId, VcpuOps, Vendor, VmId, VmParams, VmPort,
};

use crate::{DeviceMemory, GuestRam, Inside};

/// The next action of a vCPU.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Next {
    Out(u16, u8),
    Hlt,
    Shutdown,
    SystemEvent(u32),
    FailEntry(u64),
    InternalError(u32),
    Unknown(u32),
    MemoryFault(Gpa),
    Fail(Error),
    Interrupted,
}

/// The things that the host has handed out and not got back, and the operation that fails.
#[derive(Debug, Default)]
pub(crate) struct Account {
    pub(crate) vms: AtomicI64,
    pub(crate) vcpus: AtomicI64,
    pub(crate) slots: AtomicI64,
    pub(crate) operations: AtomicU64,
    /// The number of the operation that fails, from 1.
    pub(crate) fail_at: AtomicU64,
}

impl Account {
    fn operation(&self) -> Result<()> {
        static FAILED: OpName = OpName("what the test withholds");
        let n = self.operations.fetch_add(1, Ordering::SeqCst) + 1;
        if n == self.fail_at.load(Ordering::SeqCst) {
            return Err(Error::HostLacks(&FAILED));
        }
        Ok(())
    }

    pub(crate) fn alive(&self) -> [i64; 3] {
        [&self.vms, &self.vcpus, &self.slots].map(|n| n.load(Ordering::SeqCst))
    }
}

/// The host. Each vCPU of a VM does what `scripts` has for its number, then waits for a kick.
#[derive(Clone, Debug, Default)]
pub(crate) struct TestHost {
    pub(crate) account: Arc<Account>,
    pub(crate) scripts: Vec<Vec<Next>>,
    /// True if vCPUs take programs, as a software platform's do.
    pub(crate) programs: bool,
}

impl Host for TestHost {
    type Vm = TestVm;
    type Seam = NoPort;
    type Psp = NoPort;
    type Pages = NoPort;

    fn name(&self) -> &'static str {
        "test"
    }

    fn vendor(&self) -> Vendor {
        Vendor::Intel
    }

    fn runs(&self) -> Runs {
        if self.programs {
            Runs::Programs
        } else {
            Runs::Processor
        }
    }

    fn next_vm_id(&self) -> VmId {
        VmId(1)
    }

    fn create_vm(&self, _: Tech, _: &VmParams) -> Result<TestVm> {
        self.account.operation()?;
        self.account.vms.fetch_add(1, Ordering::SeqCst);
        Ok(TestVm { host: self.clone() })
    }
}

pub(crate) struct TestVm {
    host: TestHost,
}

impl TestVm {
    fn operation(&self) -> Result<()> {
        self.host.account.operation()
    }
}

impl Drop for TestVm {
    fn drop(&mut self) {
        self.host.account.vms.fetch_sub(1, Ordering::SeqCst);
    }
}

impl VmPort for TestVm {
    type Vcpu = TestVcpu;

    fn create_vcpu(&self, id: VcpuId) -> Result<TestVcpu> {
        self.operation()?;
        self.host.account.vcpus.fetch_add(1, Ordering::SeqCst);
        let script = self.host.scripts.get(id.0 as usize);
        Ok(TestVcpu {
            id,
            account: self.host.account.clone(),
            programs: self.host.programs,
            script: script.cloned().unwrap_or_default().into(),
            kicker: Arc::default(),
            data: Vec::new(),
            set: Set::default(),
        })
    }

    fn set_memory_slot(&self, _: &MemSlot) -> Result<()> {
        self.operation()?;
        self.host.account.slots.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn delete_memory_slot(&self, _: &MemSlot) -> Result<()> {
        self.host.account.slots.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    fn dirty_log(&self, _: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        bitmap[0] = 0b101;
        Ok(())
    }

    fn set_tss_addr(&self, _: Gpa) -> Result<()> {
        self.operation()
    }

    fn set_identity_map_addr(&self, _: Gpa) -> Result<()> {
        self.operation()
    }

    fn has_emulated_msr(&self, _: u32) -> bool {
        false
    }

    fn deliver_interrupt(&self, _: VcpuId, _: u8) -> Result<()> {
        Ok(())
    }

    fn close(self) -> Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct TestKicker {
    kicked: Mutex<bool>,
    changed: Condvar,
}

impl Kick for TestKicker {
    fn kick(&self) {
        *self.kicked.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

/// The registers that were set.
#[derive(Clone, Debug, Default)]
pub(crate) struct Set {
    pub(crate) regs: Regs,
    pub(crate) sregs: Sregs,
}

pub(crate) struct TestVcpu {
    id: VcpuId,
    account: Arc<Account>,
    programs: bool,
    script: VecDeque<Next>,
    kicker: Arc<TestKicker>,
    data: Vec<u8>,
    pub(crate) set: Set,
}

impl Drop for TestVcpu {
    fn drop(&mut self) {
        self.account.vcpus.fetch_sub(1, Ordering::SeqCst);
    }
}

impl VcpuOps for TestVcpu {
    fn id(&self) -> VcpuId {
        self.id
    }

    fn vcpu_run(&mut self) -> Result<Exit> {
        let Some(next) = self.script.pop_front() else {
            let mut kicked = self.kicker.kicked.lock().unwrap();
            while !*kicked {
                kicked = self.kicker.changed.wait(kicked).unwrap();
            }
            *kicked = false;
            return Ok(Exit::Interrupted);
        };
        Ok(match next {
            Next::Out(port, byte) => {
                self.data = vec![byte];
                Exit::IoOut {
                    port,
                    size: 1,
                    count: 1,
                }
            }
            Next::Hlt => Exit::Hlt,
            Next::Shutdown => Exit::Shutdown,
            Next::SystemEvent(kind) => Exit::SystemEvent { kind },
            Next::FailEntry(reason) => Exit::FailEntry { reason, cpu: 0 },
            Next::InternalError(suberror) => {
                self.data = [0x77_u64; 2].map(u64::to_ne_bytes).concat();
                Exit::InternalError { suberror }
            }
            Next::Unknown(reason) => Exit::Unknown { reason },
            Next::MemoryFault(gpa) => Exit::MemoryFault {
                gpa,
                bytes: 4096,
                access: Privacy::Private,
            },
            Next::Fail(error) => return Err(error),
            Next::Interrupted => Exit::Interrupted,
        })
    }

    fn exit_data(&mut self) -> &mut [u8] {
        &mut self.data
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        self.kicker.clone()
    }

    fn vcpu_reset(&mut self, _: bool) -> Result<()> {
        Ok(())
    }

    fn vcpu_load(&mut self, _: CpuId) -> Result<()> {
        Ok(())
    }

    fn vcpu_free(self) -> Result<()> {
        Ok(())
    }

    fn programs(&mut self) -> Option<&mut dyn Programs> {
        self.programs.then_some(self)
    }

    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        self.account.operation()?;
        self.set.regs = *regs;
        Ok(())
    }

    fn sregs(&self) -> Result<Sregs> {
        self.account.operation()?;
        Ok(self.set.sregs)
    }

    fn set_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        self.account.operation()?;
        self.set.sregs = *sregs;
        Ok(())
    }
}

impl Programs for TestVcpu {
    fn load_program(&mut self, _: Box<dyn GuestProgram>) -> Result<()> {
        self.account.operation()
    }
}

/// The inside of a machine without a VM, for tests of devices.
pub(crate) struct Alone(GuestRam);

impl Alone {
    pub(crate) fn new() -> Self {
        Self(GuestRam::new(1 << 20, 0, false).expect("1 MiB"))
    }
}

impl Inside for Alone {
    fn memory(&self) -> DeviceMemory<'_> {
        DeviceMemory::new(&self.0)
    }
}
