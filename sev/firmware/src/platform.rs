//! A machine with an AMD SP, as software sees it.

use crate::attestation::CertChain;
use crate::builder::{Builder, Config, TcbVersion};
use crate::command::{Command, CommandStruct};
use crate::crypto::Certificate;
use crate::dump::Snapshot;
use crate::firmware::{Firmware, Sp};
use crate::inject::{Failure, RandomFailures};
use crate::machine::Machine;
use crate::machine::access::{AccessFault, GuestPage};
use crate::machine::entry::{PageSize, PageState, RmpEntry};
use crate::machine::open::GuestFrame;
use crate::machine::region::pieces;
use crate::machine::rmp_types::{GuestRmpError, RmpAdjust, RmpError, RmpUpdate};
use crate::machine::turn::GuestTurn;
use crate::observe::{Counters, Operation, TraceEntry};
use crate::status::Status;
use crate::sync::Lock;
use crate::vlek::{VlekSeed, WrappedVlek};
use crate::wire::u64_at;
use kvm_ops_turns::Turns;
use std::fmt;
use std::ops::RangeInclusive;

/// A machine with memory, an RMP, cores and an AMD SP.
///
/// Every method takes `&self` and may be called from many threads. Commands are carried out one
/// at a time, as the mailbox does; instructions and memory accesses run beside them and are atomic
/// for one page. There is no other state than this value: platforms do not know of each other.
pub struct Platform {
    machine: Machine,
    sp: Lock<Sp>,
}

impl fmt::Debug for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Platform")
            .field("memory", &self.machine.memory.len())
            .finish_non_exhaustive()
    }
}

impl Platform {
    /// Describes a platform.
    pub fn builder() -> Builder {
        Builder::default()
    }

    pub(crate) fn new(config: Config, seed: [u8; 32]) -> Self {
        Self {
            sp: Lock::new(Sp::new(&config, seed)),
            machine: Machine::new(config),
        }
    }

    // --- Commands ---

    /// Carries out a command whose buffer the caller holds, as a driver's bounce buffer does. The
    /// buffer is written even if the command fails, because output lengths come with an error. It
    /// may be longer than the command needs; if it is shorter the status is INVALID_LEN.
    pub fn command(&self, id: impl Into<u32>, buffer: &mut [u8]) -> Status {
        self.execute(&mut self.sp.lock(), id.into(), buffer)
    }

    fn execute(&self, sp: &mut Sp, id: u32, buffer: &mut [u8]) -> Status {
        let command = Command::from_id(id);
        let operation = command.map_or(Operation::UnknownCommand(id), Operation::Command);
        let operands = [u64_at(buffer, 0), u64_at(buffer, 8)];
        let injected = self.machine.monitor.lock().injected(operation);
        let status = match (injected, command) {
            (Some(code), _) => Status(code as u16),
            (None, None) => Status::INVALID_COMMAND,
            (None, Some(command)) => {
                let machine = &self.machine;
                match buffer.get_mut(..command.buffer_len()) {
                    Some(buffer) => Firmware { sp, machine }.execute(command, buffer).into(),
                    None => Status::INVALID_LEN,
                }
            }
        };
        self.machine
            .monitor
            .lock()
            .record(operation, operands, status.0.into());
        status
    }

    /// Carries out a command whose buffer lies in system memory, as the mailbox does. While SNP is
    /// initialised, a buffer that the command writes to must lie in a page of the firmware.
    pub fn mailbox(&self, id: impl Into<u32>, buffer: u64) -> Status {
        let id = id.into();
        let mut sp = self.sp.lock();
        let command = match Command::from_id(id) {
            Some(command) if command.buffer_len() != 0 => command,
            _ => return self.execute(&mut sp, id, &mut []),
        };
        let address = buffer & !(1 << self.machine.config.c_bit);
        let mut bytes = vec![0; command.buffer_len()];
        let refused = if self.machine.host_read(address, &mut bytes).is_err() {
            Some(Status::INVALID_ADDRESS)
        } else if command.writes_buffer() && !self.may_write(&sp, address, bytes.len()) {
            Some(Status::INVALID_PAGE_STATE)
        } else {
            None
        };
        if let Some(status) = refused {
            let mut monitor = self.machine.monitor.lock();
            monitor.record(command.into(), [address, 0], status.0.into());
            return status;
        }
        let status = self.execute(&mut sp, id, &mut bytes);
        if command.writes_buffer() {
            for (at, offset, range) in pieces(address, bytes.len()) {
                if let Some(place) = self.machine.memory.place(at) {
                    place.lock().write(place.index, offset, &bytes[range]);
                }
            }
        }
        status
    }

    /// Pages in Firmware state stay in it while the mailbox is held.
    fn may_write(&self, sp: &Sp, address: u64, len: usize) -> bool {
        let firmware = |at| self.machine.rmpread(at).map(|e| e.state) == Some(PageState::Firmware);
        sp.snp.is_none() || pieces(address, len).all(|(at, _, _)| firmware(at))
    }

    /// Carries out the command of a structure and writes its outputs into it.
    ///
    /// ```
    /// use soft_amd_sp::{Platform, command::*};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let p = Platform::builder().seed(1).build()?;
    /// p.run(&mut Init::default()).ok()?;
    /// let mut start = LaunchStart { policy: SevPolicy::NODBG, ..Default::default() };
    /// p.run(&mut start).ok()?;
    /// p.wbinvd_all();
    /// p.run(&mut DfFlush).ok()?;
    /// p.run(&mut Activate { handle: start.handle, asid: 100.into() }).ok()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn run<C: CommandStruct>(&self, buffer: &mut C) -> Status {
        self.command(C::COMMAND, buffer.as_mut_bytes())
    }

    // --- The host's processors ---

    /// Number of cores.
    pub fn cores(&self) -> u32 {
        self.machine.config.cores
    }

    /// WBINVD on one core; `false` if there is no such core.
    pub fn wbinvd(&self, core: u32) -> bool {
        self.machine.wbinvd(core)
    }

    /// WBINVD on every core.
    pub fn wbinvd_all(&self) {
        for core in 0..self.cores() {
            self.machine.wbinvd(core);
        }
    }

    /// Sets SYSCFG.SNP_EN on one core; `false` if there is no such core. The RMP and its
    /// instructions are in force once every core has it.
    pub fn enable_snp(&self, core: u32) -> bool {
        self.machine.enable_snp(core)
    }

    /// Sets SYSCFG.SNP_EN on every core.
    pub fn enable_snp_all(&self) {
        for core in 0..self.cores() {
            self.machine.enable_snp(core);
        }
    }

    /// Reads memory as the host sees it: cipher text where a guest's key was used.
    pub fn host_read(&self, spa: u64, out: &mut [u8]) -> Result<(), AccessFault> {
        self.machine.host_read(spa, out)
    }

    /// Writes memory as the host. A page that the host does not own faults, and what precedes it
    /// is written, as a processor does.
    pub fn host_write(&self, spa: u64, data: &[u8]) -> Result<(), AccessFault> {
        self.machine.host_write(spa, data)
    }

    /// RMPUPDATE: changes the state of a page.
    pub fn rmpupdate(&self, spa: u64, new: &RmpUpdate) -> Result<(), RmpError> {
        self.machine.rmpupdate(spa, new)
    }

    /// PSMASH: splits a 2 MiB entry into 512 of 4 KiB.
    pub fn psmash(&self, spa: u64) -> Result<(), RmpError> {
        self.machine.psmash(spa)
    }

    /// RMPREAD: the entry that governs a page; `None` beyond the end of memory.
    pub fn rmpread(&self, spa: u64) -> Option<RmpEntry> {
        self.machine.rmpread(spa)
    }

    // --- Guests ---

    /// Reads private memory (C-bit set) as a guest.
    pub fn guest_read(&self, page: &GuestPage, out: &mut [u8]) -> Result<(), AccessFault> {
        self.machine.guest_read(page, out)
    }

    /// Writes private memory (C-bit set) as a guest.
    pub fn guest_write(&self, page: &GuestPage, data: &[u8]) -> Result<(), AccessFault> {
        self.machine.guest_write(page, data)
    }

    /// Reads shared memory (C-bit clear) as a guest.
    pub fn guest_read_shared(&self, page: &GuestPage, out: &mut [u8]) -> Result<(), AccessFault> {
        self.machine.guest_read_shared(page, out)
    }

    /// Writes shared memory (C-bit clear) as a guest.
    pub fn guest_write_shared(&self, page: &GuestPage, data: &[u8]) -> Result<(), AccessFault> {
        self.machine.guest_write_shared(page, data)
    }

    /// PVALIDATE by an SNP guest. `Ok(false)` is the carry flag: the page was in that state.
    pub fn pvalidate(
        &self,
        page: &GuestPage,
        size: PageSize,
        validate: bool,
    ) -> Result<bool, GuestRmpError> {
        self.machine.pvalidate(page, size, validate)
    }

    /// RMPADJUST by an SNP guest.
    pub fn rmpadjust(
        &self,
        page: &GuestPage,
        size: PageSize,
        adjust: &RmpAdjust,
    ) -> Result<(), GuestRmpError> {
        self.machine.rmpadjust(page, size, adjust)
    }

    // --- The processors of guests ---

    /// Waits for a turn at the private memory of the guest that runs with an ASID, which nobody else has.
    ///
    /// # Errors
    /// [`AccessFault::NotActive`]: no guest is active with the ASID.
    pub fn guest_turn(&self, asid: u32) -> Result<GuestTurn, AccessFault> {
        self.machine.guest_turn(asid, Turns::take)
    }

    /// Waits for a turn that other processors with the ASID share, each for the thread that calls this: they use the
    /// guest's frames by atomic accesses.
    ///
    /// # Errors
    /// As [`guest_turn`](Self::guest_turn).
    pub fn guest_turn_shared(&self, asid: u32) -> Result<GuestTurn, AccessFault> {
        self.machine.guest_turn(asid, Turns::share)
    }

    /// Lends a private page (C-bit set) to a processor of the guest that has the turn. `need` is what
    /// it wants to do: bits of [`permission`](crate::permission).
    ///
    /// # Errors
    /// As [`guest_read`](Self::guest_read) and [`guest_write`](Self::guest_write);
    /// [`AccessFault::InUse`] passes.
    pub fn guest_frame(
        &self,
        turn: &GuestTurn,
        page: &GuestPage,
        need: u8,
    ) -> Result<GuestFrame, AccessFault> {
        self.machine.guest_frame(turn, page, need)
    }

    /// The register state of a vCPU (VMSA), as VMRUN loads it.
    ///
    /// # Errors
    /// [`AccessFault::NotVmsa`] unless the page holds one of the guest's; for guests without SNP,
    /// whose pages the RMP does not know, any page will do.
    pub fn vmsa_read(&self, asid: u32, spa: u64) -> Result<Box<[u8; 4096]>, AccessFault> {
        self.machine.vmsa_read(asid, spa)
    }

    /// Stores the register state of a vCPU (VMSA), as #VMEXIT does.
    ///
    /// # Errors
    /// As [`vmsa_read`](Self::vmsa_read).
    pub fn vmsa_write(&self, asid: u32, spa: u64, page: &[u8; 4096]) -> Result<(), AccessFault> {
        self.machine.vmsa_write(asid, spa, page)
    }

    // --- What the hardware is ---

    /// Size of memory in bytes.
    pub fn memory_len(&self) -> u64 {
        self.machine.memory.len()
    }

    /// Position of the C-bit.
    pub fn c_bit(&self) -> u32 {
        self.machine.config.c_bit
    }

    /// Family, model and stepping of the platform's processor, as reports of version 3 and later have them.
    pub fn cpuid_fms(&self) -> (u8, u8, u8) {
        self.machine.config.fms
    }

    /// Family, model and stepping of the processor, as CPUID reports them (leaf 1, EAX).
    pub fn cpuid_signature(&self) -> u32 {
        self.machine.config.cpuid_signature()
    }

    /// The version of the firmware's parts that reports name, and that the VCEK is derived from.
    pub fn reported_tcb(&self) -> TcbVersion {
        self.sp.lock().tcb.reported
    }

    /// ASIDs of guests without SEV-ES, as CPUID reports them.
    pub fn sev_asids(&self) -> RangeInclusive<u32> {
        self.machine.config.min_sev_asid..=self.machine.config.max_asid
    }

    /// ASIDs of SEV-ES and SNP guests, as CPUID reports them; may be empty.
    pub fn es_asids(&self) -> RangeInclusive<u32> {
        1..=self.machine.config.min_sev_asid - 1
    }

    /// Certificates from the key that signs SNP reports up to the root, in the layout of the SEV
    /// API. Services that certify keys as X.509 take the VCEK's public key from here.
    pub fn cert_chain(&self) -> CertChain {
        let mut sp = self.sp.lock();
        let reported = sp.tcb.reported;
        let [ask, ark] = sp.identity.root_certs();
        CertChain {
            vcek: sp.identity.vcek_cert(reported),
            ask,
            ark,
        }
    }

    /// Certificates of the VLEK, as [`cert_chain`](Self::cert_chain) has those of the VCEK; `None`
    /// while no VLEK is loaded.
    pub fn vlek_chain(&self) -> Option<CertChain> {
        let mut sp = self.sp.lock();
        let seed = sp.vlek.clone()?;
        let reported = sp.tcb.reported;
        let [ask, ark] = sp.identity.root_certs();
        Some(CertChain {
            vcek: sp.identity.vlek_cert(&seed, reported),
            ask,
            ark,
        })
    }

    /// A provider's seed as the vendor's key service wraps it for this chip, for SNP_VLEK_LOAD. An
    /// `iv` must not be used twice for one chip.
    pub fn wrap_vlek(&self, seed: &VlekSeed, iv: [u8; 12]) -> WrappedVlek {
        let key = self.sp.lock().identity.vlek_wrapping_key();
        seed.wrap(&key, iv)
    }

    /// Identity of the chip, as GET_ID and unmasked reports have it.
    pub fn chip_id(&self) -> [u8; 64] {
        self.sp.lock().identity.chip_id
    }

    /// ASK and ARK, one after the other: the vendor's certificates that SEND_START takes.
    pub fn vendor_certs(&self) -> Vec<u8> {
        let [ask, ark] = self.sp.lock().identity.root_certs();
        [ask, ark].iter().flat_map(|c| *c.as_bytes()).collect()
    }

    /// Certificate of the platform endorsement key.
    pub fn pek_cert(&self) -> Certificate {
        self.sp.lock().identity.pek_cert()
    }

    /// Certificate of the Diffie-Hellman key, which a guest owner makes a session for.
    pub fn pdh_cert(&self) -> Certificate {
        self.sp.lock().identity.pdh_cert()
    }

    // --- Failures on request ---

    /// Plans one failure; `false` if too many are planned already.
    pub fn fail(&self, failure: Failure) -> bool {
        self.machine.monitor.lock().injection.plan(failure)
    }

    /// Makes the next call of a command end with a status, without effect.
    pub fn fail_next(&self, command: Command, status: Status) -> bool {
        self.fail(Failure {
            operation: command.into(),
            nth: 1,
            code: status.0.into(),
        })
    }

    /// Makes random calls fail.
    pub fn fail_randomly(&self, random: RandomFailures) {
        self.machine.monitor.lock().injection.randomly(random);
    }

    /// Forgets every planned failure.
    pub fn clear_failures(&self) {
        self.machine.monitor.lock().injection.clear();
    }

    /// Makes every free ASID need WBINVD and DF_FLUSH, as if each had just been released.
    pub fn require_df_flush(&self) {
        let mut sp = self.sp.lock();
        sp.asids.soil();
        self.machine.forget_wbinvd();
    }

    /// Limits the number of guest contexts; LAUNCH_START, RECEIVE_START and SNP_GCTX_CREATE then
    /// give RESOURCE_LIMIT. Guests that exist stay.
    pub fn limit_guests(&self, n: usize) {
        self.sp.lock().max_guests = n;
    }

    // --- Observation ---

    /// Number of calls of each operation, by result.
    pub fn counters(&self) -> Counters {
        self.machine.monitor.lock().counters()
    }

    /// The latest calls, oldest first.
    pub fn trace(&self) -> Vec<TraceEntry> {
        self.machine.monitor.lock().trace()
    }

    /// Guests, ASIDs and RMP at one moment between two commands.
    pub fn snapshot(&self) -> Snapshot {
        let sp = self.sp.lock();
        Snapshot::take(&sp, &self.machine)
    }
}
