//! Helpers of the migration tests: two software platforms behind the ports, the two ends of a
//! migration at the level of SP commands, and links that fail where they are told to.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use embedded_io::{ErrorKind, ErrorType, Read, Write};
use kvm_ops_core::{
    Error, Gfn, Host, Level, Page as HostPage, PagePort, Result, Tech, VcpuId, Vendor,
};
use kvm_ops_sev::migrate::{
    FrameContent, FrameSet, Layout, Mailbox, MigrateSource, MigrateTarget, Packet, PacketOf,
    PlatformCerts, SessionStart, Shape, VcpuContent,
};
use kvm_ops_sim::{SevSetup, SimHost};
use soft_amd_sp::command::*;
use soft_amd_sp::{GuestPage, Platform};

pub const PAGE: usize = 4096;
pub type Page = [u8; PAGE];

/// A software machine, with the AMD SP below it.
#[derive(Clone)]
pub struct Machine {
    pub host: SimHost,
    pub platform: Arc<Platform>,
}

impl Machine {
    /// SEV and SEV-ES initialised and flushed; guests here are made at the level of commands.
    pub fn new(seed: u64) -> Self {
        let platform = Platform::builder()
            .memory(32 << 20)
            .cores(2)
            .asids(6, 12)
            .seed(seed);
        let setup = SevSetup::new(platform).without_snp();
        let host = SimHost::builder(Vendor::Amd).sev(setup).build().unwrap();
        let platform = Arc::clone(host.sev_platform().unwrap());
        Self { host, platform }
    }

    /// Pages that were taken and not given back, in units of 4 KiB.
    pub fn pages_out(&self) -> u64 {
        self.host.pages().unwrap().frames_out()
    }

    pub fn alloc(&self) -> Result<HostPage> {
        self.host.pages().unwrap().alloc(Level::Size4K)
    }

    pub fn free(&self, page: HostPage) {
        self.host.pages().unwrap().free(page).unwrap();
    }

    pub fn flush(&self) {
        self.platform.wbinvd_all();
        self.ok(DfFlush);
    }

    pub fn run<C: CommandStruct>(&self, mut buffer: C) -> (u32, C) {
        (self.platform.run(&mut buffer).0.into(), buffer)
    }

    pub fn ok<C: CommandStruct>(&self, buffer: C) -> C {
        let (status, buffer) = self.run(buffer);
        assert_eq!(status, 0, "{}", C::COMMAND);
        buffer
    }

    /// A command that may fail.
    pub fn try_to<C: CommandStruct>(&self, buffer: C) -> Result<()> {
        match self.run(buffer).0 {
            0 => Ok(()),
            status => Err(Error::Firmware(status.into())),
        }
    }

    pub fn guest_state(&self, handle: u32) -> u8 {
        let status = GuestStatus {
            handle: handle.into(),
            ..Default::default()
        };
        self.ok(status).state
    }

    pub fn guests(&self) -> usize {
        self.platform.snapshot().guests.len()
    }
}

fn spa(page: &HostPage) -> u64 {
    page.hpa().get()
}

/// The memory of a guest of these tests.
pub struct Memory {
    pub private: BTreeMap<u64, HostPage>,
    pub shared: BTreeMap<u64, Box<Page>>,
}

/// A guest at the end that it leaves. It writes memory while it runs: one write for each page
/// that is sent.
pub struct RawSource<'m> {
    pub machine: &'m Machine,
    mailbox: Mailbox<'m, SimHost>,
    pub handle: u32,
    pub asid: u32,
    pub tech: Tech,
    pub policy: u32,
    pub layout: Layout,
    pub memory: Memory,
    pub vmsas: Vec<HostPage>,
    /// Registers of vCPUs that the host may see.
    pub registers: Vec<Vec<u8>>,
    pub dirty: FrameSet,
    pub follows: bool,
    pub running: bool,
    /// Writes of the guest while it runs, taken from the back. `None`: the frame goes away.
    pub script: Vec<(u64, Option<u8>)>,
    /// Successful SEND_START and SEND_CANCEL.
    pub starts: u32,
    pub cancels: u32,
}

pub const ASID: u32 = 6;
pub const ES_ASID: u32 = 1;

impl<'m> RawSource<'m> {
    /// A running guest with memory at frames 0 to `pages - 1` and from 0x1000 on: every third
    /// frame of the first range is shared, every fifth holds nothing.
    pub fn new(machine: &'m Machine, tech: Tech, extra_policy: u32, pages: u64) -> Self {
        let (policy, asid) = match tech {
            Tech::SevEs => (SevPolicy::ES.bits() | extra_policy, ES_ASID),
            _ => (extra_policy, ASID),
        };
        let layout = Layout::new([(Gfn::new(0), pages), (Gfn::new(0x1000), 4)]).unwrap();
        let start = LaunchStart {
            policy: SevPolicy::new(policy).unwrap(),
            ..Default::default()
        };
        let handle = machine.ok(start).handle;
        machine.ok(Activate {
            handle,
            asid: asid.into(),
        });
        let mut memory = Memory {
            private: BTreeMap::new(),
            shared: BTreeMap::new(),
        };
        let frames = (0..pages).chain(0x1000..0x1004);
        for gfn in frames.filter(|gfn| gfn % 5 != 4) {
            let content = [gfn as u8 ^ 0x5a; PAGE];
            if gfn % 3 == 0 {
                let content = if gfn == 0 { [0; PAGE] } else { content };
                memory.shared.insert(gfn, Box::new(content));
                continue;
            }
            let page = machine.alloc().unwrap();
            machine.platform.host_write(spa(&page), &content).unwrap();
            machine.ok(LaunchUpdateData {
                handle,
                data_paddr: spa(&page).into(),
                data_len: (PAGE as u32).into(),
                ..Default::default()
            });
            memory.private.insert(gfn, page);
        }
        let (mut vmsas, mut registers) = (Vec::new(), Vec::new());
        for vcpu in 0..2u8 {
            if tech == Tech::SevEs {
                let page = machine.alloc().unwrap();
                let content = [vcpu | 0x80; PAGE];
                machine.platform.host_write(spa(&page), &content).unwrap();
                machine.ok(LaunchUpdateVmsa {
                    handle,
                    vmsa_paddr: spa(&page).into(),
                    vmsa_len: (PAGE as u32).into(),
                    ..Default::default()
                });
                vmsas.push(page);
            } else {
                registers.push(vec![vcpu | 0x40; 200 + usize::from(vcpu)]);
            }
        }
        let scratch = machine.alloc().unwrap();
        machine.ok(LaunchMeasure {
            handle,
            measure_paddr: spa(&scratch).into(),
            measure_len: 48.into(),
            ..Default::default()
        });
        machine.free(scratch);
        machine.ok(LaunchFinish { handle });
        let handle = handle.get();
        Self {
            machine,
            mailbox: Mailbox::new(&machine.host).unwrap(),
            handle,
            asid,
            tech,
            policy,
            dirty: FrameSet::new(&layout),
            layout,
            memory,
            vmsas,
            registers,
            follows: true,
            running: true,
            script: Vec::new(),
            starts: 0,
            cancels: 0,
        }
    }

    /// The guest's view of its memory, frame by frame.
    pub fn view(&self) -> BTreeMap<u64, Page> {
        view(self.machine, self.asid, &self.memory)
    }

    /// A write by the guest.
    pub fn write(&mut self, gfn: u64, value: u8) {
        assert!(self.running);
        if let Some(page) = self.memory.private.get(&gfn) {
            let at = GuestPage::new(self.asid, gfn << 12, spa(page));
            self.machine
                .platform
                .guest_write(&at, &[value; 32])
                .unwrap();
        } else if let Some(page) = self.memory.shared.get_mut(&gfn) {
            page[..32].fill(value);
        } else {
            return;
        }
        self.dirty.insert(Gfn::new(gfn));
    }

    /// Turns a frame into one without memory.
    pub fn drop_frame(&mut self, gfn: u64) {
        if let Some(page) = self.memory.private.remove(&gfn) {
            self.machine.free(page);
        }
        self.memory.shared.remove(&gfn);
        self.dirty.insert(Gfn::new(gfn));
    }

    pub fn tear_down(mut self) {
        let handle = self.handle.into();
        self.machine.ok(Deactivate { handle });
        self.machine.ok(Decommission { handle });
        self.machine.flush();
        free_all(self.machine, &mut self.memory, &mut self.vmsas);
    }
}

fn view(machine: &Machine, asid: u32, memory: &Memory) -> BTreeMap<u64, Page> {
    let mut all: BTreeMap<u64, Page> = memory.shared.iter().map(|(g, p)| (*g, **p)).collect();
    for (gfn, page) in &memory.private {
        let mut content = [0; PAGE];
        let at = GuestPage::new(asid, gfn << 12, spa(page));
        machine.platform.guest_read(&at, &mut content).unwrap();
        all.insert(*gfn, content);
    }
    all
}

fn free_all(machine: &Machine, memory: &mut Memory, vmsas: &mut Vec<HostPage>) {
    let private = std::mem::take(&mut memory.private);
    let pages = private.into_values().chain(vmsas.drain(..));
    pages.for_each(|page| machine.free(page));
    memory.shared.clear();
}

impl MigrateSource for RawSource<'_> {
    fn shape(&self) -> Result<Shape> {
        Ok(Shape {
            tech: self.tech,
            policy: self.policy,
            vcpus: 2,
            layout: self.layout.clone(),
        })
    }

    fn send_start(&mut self, target: &PlatformCerts) -> Result<SessionStart> {
        let start = self.mailbox.send_start(self.handle, target)?;
        self.starts += 1;
        Ok(start)
    }

    fn frame(&mut self, gfn: Gfn, packet: &mut Packet) -> Result<FrameContent> {
        if self.running {
            match self.script.pop() {
                Some((gfn, Some(value))) => self.write(gfn, value),
                Some((gfn, None)) => self.drop_frame(gfn),
                None => {}
            }
        }
        if let Some(page) = self.memory.private.get(&gfn.get()) {
            self.mailbox
                .send_update(self.handle, PacketOf::Memory, page.pfn(), packet)?;
            return Ok(FrameContent::Private);
        }
        match self.memory.shared.get(&gfn.get()) {
            Some(page) => {
                packet.data = **page;
                Ok(FrameContent::Shared)
            }
            None => Ok(FrameContent::Absent),
        }
    }

    fn vcpu(&mut self, vcpu: VcpuId, packet: &mut Packet) -> Result<VcpuContent> {
        assert!(!self.running);
        if self.tech == Tech::SevEs {
            let page = self.vmsas[vcpu.0 as usize].pfn();
            self.mailbox
                .send_update(self.handle, PacketOf::Vmsa, page, packet)?;
            return Ok(VcpuContent::Vmsa);
        }
        let registers = &self.registers[vcpu.0 as usize];
        packet.data[..registers.len()].copy_from_slice(registers);
        Ok(VcpuContent::Clear(registers.len()))
    }

    fn take_dirty(&mut self, frames: &mut FrameSet) -> Result<bool> {
        while let Some(gfn) = self.dirty.pop_first() {
            frames.insert(gfn);
        }
        Ok(self.follows)
    }

    fn stop(&mut self) -> Result<()> {
        assert!(self.running);
        self.running = false;
        Ok(())
    }

    fn go_on(&mut self) {
        assert!(!self.running);
        self.running = true;
    }

    fn send_finish(&mut self) -> Result<()> {
        self.mailbox.send_finish(self.handle)
    }

    fn send_cancel(&mut self) -> Result<()> {
        self.mailbox.send_cancel(self.handle)?;
        self.cancels += 1;
        Ok(())
    }
}

/// A VM that waits for a guest.
pub struct RawTarget<'m> {
    pub machine: &'m Machine,
    mailbox: Mailbox<'m, SimHost>,
    pub tech: Tech,
    pub asid: u32,
    pub handle: Option<u32>,
    /// The guest has its ASID.
    active: bool,
    pub memory: Memory,
    pub vmsas: Vec<HostPage>,
    pub registers: Vec<Vec<u8>>,
    pub finished: bool,
    pub owned: bool,
}

impl<'m> RawTarget<'m> {
    pub fn new(machine: &'m Machine, tech: Tech) -> Self {
        Self {
            machine,
            mailbox: Mailbox::new(&machine.host).unwrap(),
            tech,
            asid: if tech == Tech::SevEs {
                ES_ASID + 1
            } else {
                ASID + 1
            },
            handle: None,
            active: false,
            memory: Memory {
                private: BTreeMap::new(),
                shared: BTreeMap::new(),
            },
            vmsas: Vec::new(),
            registers: Vec::new(),
            finished: false,
            owned: false,
        }
    }

    pub fn view(&self) -> BTreeMap<u64, Page> {
        view(self.machine, self.asid, &self.memory)
    }

    /// Plain text of the VMSAs, as the guest's key shows it.
    pub fn vmsa_view(&self) -> Vec<Page> {
        let read = |page: &HostPage| {
            let mut content = [0; PAGE];
            let at = GuestPage::new(self.asid, 0, spa(page));
            self.machine.platform.guest_read(&at, &mut content).unwrap();
            content
        };
        self.vmsas.iter().map(read).collect()
    }

    fn handle(&self) -> Result<u32> {
        self.handle.ok_or(Error::Poisoned)
    }

    /// DECOMMISSION of a guest that is not active, if there is one.
    fn forget(&mut self) -> Result<()> {
        assert!(!self.active);
        if let Some(handle) = self.handle {
            let handle = handle.into();
            self.machine.try_to(Decommission { handle })?;
            self.handle = None;
        }
        Ok(())
    }

    pub fn tear_down(mut self) {
        self.abandon().unwrap();
    }
}

impl MigrateTarget for RawTarget<'_> {
    fn certs(&mut self) -> Result<PlatformCerts> {
        let mut certs = self.mailbox.certs()?;
        certs.vendor = self.machine.platform.vendor_certs();
        Ok(certs)
    }

    fn accept(&mut self, shape: &Shape) -> Result<()> {
        if shape.tech != self.tech || shape.layout.frames() > 4096 {
            return Err(Error::Busy);
        }
        Ok(())
    }

    fn receive_start(&mut self, start: &SessionStart) -> Result<()> {
        // One that was never active, and that firmware would not forget.
        self.forget()?;
        let handle = self.mailbox.receive_start(start)?;
        self.handle = Some(handle);
        let activate = Activate {
            handle: handle.into(),
            asid: self.asid.into(),
        };
        if let Err(error) = self.machine.try_to(activate) {
            let _ = self.forget();
            return Err(error);
        }
        self.active = true;
        Ok(())
    }

    fn receive_private(&mut self, gfn: Gfn, packet: &Packet) -> Result<()> {
        assert!(!self.finished);
        let handle = self.handle()?;
        self.memory.shared.remove(&gfn.get());
        let known = self.memory.private.remove(&gfn.get());
        let is_new = known.is_none();
        let page = known.map_or_else(|| self.machine.alloc(), Ok)?;
        let of = PacketOf::Memory;
        let received = self.mailbox.receive_update(handle, of, &page, packet);
        if received.is_err() && is_new {
            self.machine.free(page);
        } else {
            self.memory.private.insert(gfn.get(), page);
        }
        received
    }

    fn receive_shared(&mut self, gfn: Gfn, page: Option<&Page>) -> Result<()> {
        assert!(!self.finished);
        self.receive_absent(gfn)?;
        let page = Box::new(page.copied().unwrap_or([0; PAGE]));
        self.memory.shared.insert(gfn.get(), page);
        Ok(())
    }

    fn receive_absent(&mut self, gfn: Gfn) -> Result<()> {
        if let Some(page) = self.memory.private.remove(&gfn.get()) {
            self.machine.free(page);
        }
        self.memory.shared.remove(&gfn.get());
        Ok(())
    }

    fn receive_vcpu(&mut self, vcpu: VcpuId, content: VcpuContent, packet: &Packet) -> Result<()> {
        let handle = self.handle()?;
        let index = vcpu.0 as usize;
        match content {
            VcpuContent::Clear(len) => {
                self.registers
                    .resize(self.registers.len().max(index + 1), Vec::new());
                self.registers[index] = packet.data[..len].to_vec();
                Ok(())
            }
            VcpuContent::Vmsa => {
                while self.vmsas.len() <= index {
                    self.vmsas.push(self.machine.alloc()?);
                }
                let (of, page) = (PacketOf::Vmsa, &self.vmsas[index]);
                self.mailbox.receive_update(handle, of, page, packet)
            }
        }
    }

    fn receive_finish(&mut self) -> Result<()> {
        self.mailbox.receive_finish(self.handle()?)?;
        self.finished = true;
        Ok(())
    }

    fn own(&mut self) {
        assert!(self.finished && !self.owned);
        self.owned = true;
    }

    /// After an error it may be called again.
    fn abandon(&mut self) -> Result<()> {
        if self.active {
            let handle = self.handle()?.into();
            self.machine.try_to(Deactivate { handle })?;
            self.active = false;
        }
        self.forget()?;
        self.machine.flush();
        free_all(self.machine, &mut self.memory, &mut self.vmsas);
        self.finished = false;
        Ok(())
    }
}

/// A fault of a link, counted in bytes that its holder writes.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    None,
    /// It breaks in both directions after so many bytes.
    CutAfter(u64),
    /// The byte of that number has a bit flipped.
    FlipAt(u64, u8),
}

/// One end of a link.
pub struct Link {
    stream: Option<UnixStream>,
    fault: Fault,
    written: u64,
}

/// Both ends; the fault is with what the first one writes.
pub fn pair(fault: Fault) -> (Link, Link) {
    let (a, b) = UnixStream::pair().unwrap();
    let end = |stream, fault| Link {
        stream: Some(stream),
        fault,
        written: 0,
    };
    (end(a, fault), end(b, Fault::None))
}

impl ErrorType for Link {
    type Error = ErrorKind;
}

impl Link {
    pub fn with_fault(self, fault: Fault) -> Self {
        Self { fault, ..self }
    }

    fn stream(&mut self) -> std::result::Result<&mut UnixStream, ErrorKind> {
        self.stream.as_mut().ok_or(ErrorKind::NotConnected)
    }
}

impl Read for Link {
    fn read(&mut self, out: &mut [u8]) -> std::result::Result<usize, ErrorKind> {
        let stream = self.stream()?;
        std::io::Read::read(stream, out).map_err(|_| ErrorKind::ConnectionReset)
    }
}

impl Write for Link {
    fn write(&mut self, data: &[u8]) -> std::result::Result<usize, ErrorKind> {
        let (fault, at) = (self.fault, self.written);
        let (mut data, mut cut) = (data.to_vec(), false);
        match fault {
            Fault::CutAfter(limit) if at + data.len() as u64 >= limit => {
                data.truncate((limit - at) as usize);
                cut = true;
            }
            Fault::FlipAt(place, bit) if (at..at + data.len() as u64).contains(&place) => {
                data[(place - at) as usize] ^= 1 << bit;
            }
            _ => {}
        }
        let stream = self.stream()?;
        std::io::Write::write_all(stream, &data).map_err(|_| ErrorKind::BrokenPipe)?;
        self.written += data.len() as u64;
        if cut {
            self.stream = None;
            return Err(ErrorKind::BrokenPipe);
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> std::result::Result<(), ErrorKind> {
        Ok(())
    }
}

/// Numbers that are as good as random for a test.
pub fn random(seed: u64) -> impl FnMut(&mut [u8]) -> Result<()> {
    let mut state = seed | 1;
    move |out| {
        for byte in out {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            *byte = (state >> 33) as u8;
        }
        Ok(())
    }
}
