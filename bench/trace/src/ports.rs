//! A machine whose TDX module agrees to everything and whose guest writes to a port, for ever.

use std::hint::black_box;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ops::guest::GuestProgram;
use kvm_ops::kit::NullVcpu;
use kvm_ops::{
    CpuId, FieldCache, Gfn, Gpa, Hkid, Host, Hpa, KeyPool, Level, MemSlot, NoPort, PackageId, Page,
    PagePort, Pfn, PortId, Result, SeamPort, SeamRegs, SharedMask, SharedMemory, TdPort, Tech,
    VcpuId, Vendor, VmId, VmParams, VmPort,
};

/// Leaves of SEAMCALL.
const VP_ENTER: u64 = 0;
const SYS_RD: u64 = 34;
/// A TD exit for TDG.VP.VMCALL, and its sub-function for port I/O.
const EXIT_TDCALL: u64 = 77;
const VMCALL_IO: u64 = 30;

/// The machine.
#[derive(Clone, Debug)]
pub(crate) struct Machine;

/// Its ports in one type.
#[derive(Debug)]
pub(crate) struct Ports {
    id: PortId,
    keys: KeyPool,
    fields: FieldCache,
    next_page: AtomicU64,
}

fn ports() -> &'static Ports {
    static PORTS: LazyLock<Ports> = LazyLock::new(|| Ports {
        id: PortId::new(),
        keys: KeyPool::new(1..64),
        fields: FieldCache::default(),
        next_page: AtomicU64::new(1),
    });
    &PORTS
}

/// The read-only fields of the module: sizes in two pages, 64 vCPUs, and every bit of a TD's
/// attributes free to choose.
const fn field(id: u64) -> u64 {
    match id & 0xffff {
        0x100 | 0x200 => 0x2000,
        0x8 => 64,
        0x0 | 0x2 => u64::MAX,
        _ => 0,
    }
}

impl Host for Machine {
    type Vm = Machine;
    type Seam = Ports;
    type Psp = NoPort;
    type Pages = Ports;

    fn name(&self) -> &'static str {
        "trace"
    }

    fn vendor(&self) -> Vendor {
        Vendor::Intel
    }

    fn next_vm_id(&self) -> VmId {
        VmId(1)
    }

    fn create_vm(&self, _: Tech, _: &VmParams) -> Result<Machine> {
        Ok(Machine)
    }

    fn seam(&self) -> Option<&Ports> {
        Some(ports())
    }

    fn pages(&self) -> Option<&Ports> {
        Some(ports())
    }
}

impl VmPort for Machine {
    type Vcpu = NullVcpu;

    fn create_vcpu(&self, _: VcpuId) -> Result<NullVcpu> {
        kvm_ops::not_offered!("a vCPU of this machine")
    }

    fn set_memory_slot(&self, _: &MemSlot) -> Result<()> {
        Ok(())
    }

    fn delete_memory_slot(&self, _: &MemSlot) -> Result<()> {
        Ok(())
    }

    fn dirty_log(&self, _: &MemSlot, _: &mut [u64]) -> Result<()> {
        Ok(())
    }

    fn set_tss_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    fn set_identity_map_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    fn has_emulated_msr(&self, _: u32) -> bool {
        false
    }

    fn deliver_interrupt(&self, _: VcpuId, _: u8) -> Result<()> {
        Ok(())
    }

    fn td(&self) -> Option<&dyn TdPort> {
        Some(self)
    }

    fn close(self) -> Result<()> {
        Ok(())
    }
}

impl SharedMemory for Machine {
    fn set_shared(&self, _: Gfn, _: u64, _: bool) -> Result<()> {
        Ok(())
    }

    fn read_slot(&self, _: Gpa, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write_slot(&self, _: Gpa, _: &[u8]) -> Result<()> {
        Ok(())
    }
}

impl TdPort for Machine {
    fn load_td_program(
        &self,
        _: VcpuId,
        _: Hpa,
        _: SharedMask,
        _: Box<dyn GuestProgram>,
    ) -> Result<()> {
        kvm_ops::not_offered!("a guest program on this machine")
    }
}

impl SeamPort for Ports {
    unsafe fn seamcall(&self, _: CpuId, rax: u64, regs: &mut SeamRegs) -> Result<u64> {
        let regs = black_box(regs);
        Ok(black_box(match rax & 0xffff {
            VP_ENTER => {
                // One byte, out, to the first serial port.
                (regs.r10, regs.r11, regs.r12) = (0, VMCALL_IO, 1);
                (regs.r13, regs.r14, regs.r15) = (1, 0x3f8, 0x2a);
                EXIT_TDCALL
            }
            SYS_RD => {
                regs.r8 = field(regs.rdx);
                0
            }
            _ => 0,
        }))
    }

    fn package_of(&self, cpu: CpuId) -> Option<PackageId> {
        (cpu.0 == 0).then_some(PackageId(0))
    }

    fn cpus(&self) -> u32 {
        1
    }

    fn packages(&self) -> u32 {
        1
    }

    fn this_cpu(&self) -> CpuId {
        CpuId(0)
    }

    fn kick(&self, _: CpuId) {}

    fn fields(&self) -> &FieldCache {
        &self.fields
    }

    fn key_ids(&self) -> &KeyPool {
        &self.keys
    }

    fn with_key_id(&self, page: Hpa, _: Option<Hkid>) -> Hpa {
        page
    }
}

impl PagePort for Ports {
    fn id(&self) -> PortId {
        self.id
    }

    fn alloc(&self, level: Level) -> Result<Page> {
        let pfn = Pfn::new(self.next_page.fetch_add(level.frames(), Ordering::Relaxed));
        // SAFETY: each number is given out once, and no memory is behind it: reads and writes have no
        // effect.
        Ok(unsafe { Page::from_raw(pfn, level, self.id) })
    }

    fn free(&self, page: Page) -> Result<(), Page> {
        drop(page);
        Ok(())
    }

    fn write(&self, _: Hpa, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn read(&self, _: Hpa, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
}
