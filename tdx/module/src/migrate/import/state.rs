//! TDH.IMPORT.STATE.IMMUTABLE, TD and VP

use super::image::{TdImage, initialise_vcpu};
use crate::call::{Call, Leaf, associate, check_pages, implicit_tdr, tdr, tdvpr};
use crate::lock::LockMode;
use crate::meta;
use crate::meta::place::{Context, Place};
use crate::meta::table::Agent;
use crate::meta::vcpu::VcpuFields;
use crate::migrate::bundle::{Bundle, ListFailure, ListPage, PageList, Progress};
use crate::migrate::cipher::Tag;
use crate::migrate::fields::{Part, Reader, Sink};
use crate::migrate::interrupt::Work;
use crate::migrate::mbmd::{Kind, Received, Specific};
use crate::migrate::operands::{MbmdBuffer, StreamOperand, invalid_mbmd, stream_busy};
use crate::migrate::stream::Stream;
use crate::op_state::OpState;
use crate::status::{Code, Operand, Status};
use crate::td::Td;
use crate::vcpu::{Vcpu, VcpuState};
use std::sync::atomic::Ordering;

/// A state bundle under import.
pub(crate) struct Incoming {
    bundle: Bundle,
    mac: Tag,
    lists: Lists,
}

/// Contents of its pages.
struct Lists {
    /// Pages of SYS fields at the beginning.
    sys_pages: u16,
    sys: Reader,
    fields: Reader,
}

impl Incoming {
    fn new(received: &Received, part: Part, context: Context) -> Self {
        let sys_pages = match received.mbmd.specific {
            Specific::Immutable { sys_pages, .. } => sys_pages.into(),
            _ => 0,
        };
        Incoming {
            bundle: Bundle::new(received.mbmd),
            mac: received.mac,
            lists: Lists {
                sys_pages,
                sys: Reader::new(part, Context::Sys),
                fields: Reader::new(part, context),
            },
        }
    }

    /// Imports pages until the bundle is complete or the call is interrupted.
    ///
    /// # Errors
    /// A page, the MAC, or what the lists showed, whose field goes to RCX.
    fn run(
        mut self,
        c: &mut Call<'_, '_>,
        stream: &mut Stream,
        operands: [u64; 2],
        list: PageList,
        sink: &mut impl Sink,
    ) -> Result<(), Stop> {
        let Some(key) = stream.key() else {
            return Err(Stop::Fatal(Code::MIGRATION_STREAM_STATE_INCORRECT.status()));
        };
        let (bundle, lists) = (&mut self.bundle, &mut self.lists);
        let progress = bundle.import_pages(c, key, list, |index, page| {
            lists.read(index, list.last, page, sink);
        });
        if progress.map_err(Stop::Fatal)? == Progress::Interrupted {
            let work = Work::Import {
                operands,
                work: self,
            };
            return Err(Stop::Interrupted(stream.interrupt(c.regs.rax, work)));
        }
        if !self.bundle.is_authentic(key, &self.mac) {
            return Err(Stop::Fatal(Code::INCORRECT_MBMD_MAC.status()));
        }
        match self.lists.failure() {
            Some(failure) => {
                c.regs.rcx = failure.field;
                Err(Stop::Fatal(failure.status))
            }
            None => Ok(()),
        }
    }
}

impl Lists {
    fn failure(&self) -> Option<ListFailure> {
        self.sys.failure().or(self.fields.failure())
    }

    fn read(&mut self, index: u16, last: u16, page: &ListPage, sink: &mut impl Sink) {
        if index < self.sys_pages {
            self.sys
                .take(page, index + 1 == self.sys_pages, &mut Unchecked);
        } else if self.failure().is_none() {
            self.fields.take(page, index == last, sink);
        }
    }
}

/// Reasons for which an import did not complete.
enum Stop {
    Interrupted(Status),
    Fatal(Status),
}

impl Stop {
    fn on(self, td: &Td) -> Status {
        match self {
            Stop::Interrupted(status) => status,
            Stop::Fatal(status) => td.import_failed(status),
        }
    }
}

/// The exporter's SYS fields describe the other module to the importer; nothing of them is stored.
struct Unchecked;

impl Sink for Unchecked {
    fn store(&mut self, _: &Place, _: u64, _: u64) -> Result<(), Status> {
        Ok(())
    }
}

/// TDH.IMPORT.STATE.IMMUTABLE
pub(crate) fn immutable(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (rcx, rdx) = (c.regs.rcx, c.regs.rdx);
    (c.regs.rcx, c.regs.rdx) = (0, 0);
    c.check_cpuid_limit()?;
    let tdr = tdr(p, rcx, LockMode::Exclusive, Operand::RCX)?;
    let td = tdr.td;
    c.td_state(td, false)?;
    if td.migration().num_migs < 2 {
        return Err(Code::MIN_MIGS_NOT_CREATED.status());
    }
    let operand = StreamOperand::parse_first(c.regs.r10)?;
    let mut stream = td.streams.forward(0).ok_or_else(stream_busy)?;
    let operands = [c.regs.r9, 0];
    let fatal = |status| td.import_failed(status);
    let work = if operand.command {
        resume(c, td, &mut stream, operands)?
    } else {
        start_session(c, td, &mut stream)?
    };
    let least = work.lists.sys_pages + 1;
    let list = PageList::parse(p, c.regs.r9, least).map_err(fatal)?;
    let mut image = TdImage::of(p, td);
    let result = work.run(c, &mut stream, operands, list, &mut image);
    if let Err(stop) = result {
        image.keep();
        if let Stop::Interrupted(_) = stop {
            (c.regs.rcx, c.regs.rdx) = (rcx, rdx);
        }
        return Err(stop.on(td));
    }
    image.apply().map_err(fatal)?;
    td.migration().total_mb_count = 1;
    td.set_op_state(OpState::MemoryImport);
    Ok(())
}

/// A resumption that does not fit ends the import, but for a stream that has nothing to resume.
fn resume(c: &Call<'_, '_>, td: &Td, stream: &mut Stream, operands: [u64; 2]) -> Leaf<Incoming> {
    let ready = stream.interrupted.is_some();
    stream
        .resume_import(c.regs.rax, operands)
        .map_err(|status| match ready {
            true => td.import_failed(status),
            false => status,
        })
}

/// Begins an import session: the keys the migration TD has set come into use.
fn start_session(c: &Call<'_, '_>, td: &Td, stream: &mut Stream) -> Leaf<Incoming> {
    let p = c.p;
    let mut m = td.migration();
    m.begin_session(&p.machine, p.cfg.rdseed_tries)?;
    td.streams.forget_others(0);
    stream.initialise(m.dec_working_key);
    let fatal = |status| td.import_failed(status);
    let input = MbmdBuffer::parse(p, c.regs.r8).map_err(fatal)?;
    let received = Received::parse(&input.read(p), Kind::Immutable, m.working_version)
        .filter(|r| r.mbmd.stream == 0 && r.mbmd.mb_counter == 0 && r.mbmd.epoch == 0)
        .ok_or_else(|| fatal(invalid_mbmd()))?;
    match received.mbmd.specific {
        Specific::Immutable { sys_pages: 0, .. } => return Err(fatal(invalid_mbmd())),
        Specific::Immutable {
            forward_streams, ..
        } if forward_streams > m.num_migs - 1 => {
            return Err(fatal(Code::NUM_MIGS_HIGHER_THAN_CREATED.status()));
        }
        _ => {}
    }
    stream.iv_counter = received.mbmd.iv_counter;
    stream.expected_mb = 1;
    let context = Context::Td { l2_vms: 0 };
    Ok(Incoming::new(&received, Part::Immutable, context))
}

/// Checks the MBMD of a bundle in the running session.
fn receive(
    c: &Call<'_, '_>,
    td: &Td,
    stream: &mut Stream,
    index: u16,
    kind: Kind,
) -> Leaf<Received> {
    let input = MbmdBuffer::parse(c.p, c.regs.r8)?;
    let (version, epoch) = {
        let m = td.migration();
        (m.working_version, m.mig_epoch)
    };
    let received = Received::parse(&input.read(c.p), kind, version)
        .filter(|r| r.mbmd.stream == index && r.mbmd.epoch == epoch)
        .filter(|r| r.mbmd.mb_counter == stream.expected_mb)
        .ok_or_else(invalid_mbmd)?;
    stream.iv_counter = received.mbmd.iv_counter;
    stream.expected_mb = stream.expected_mb.wrapping_add(1);
    Ok(received)
}

/// TDH.IMPORT.STATE.TD
pub(crate) fn td(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (rcx, rdx) = (c.regs.rcx, c.regs.rdx);
    (c.regs.rcx, c.regs.rdx) = (0, 0);
    let tdr = tdr(p, rcx, LockMode::Exclusive, Operand::RCX)?;
    let td = tdr.td;
    c.td_state(td, false)?;
    let operand = StreamOperand::parse_first(c.regs.r10)?;
    let mut stream = td.streams.forward(0).ok_or_else(stream_busy)?;
    if !stream.is_initialised() {
        return Err(Code::MIGRATION_STREAM_STATE_INCORRECT.status());
    }
    let operands = [c.regs.r9, 0];
    let fatal = |status| td.import_failed(status);
    let work = if operand.command {
        resume(c, td, &mut stream, operands)?
    } else {
        let received = receive(c, td, &mut stream, 0, Kind::TdState).map_err(fatal)?;
        Incoming::new(&received, Part::Mutable, meta::td::context(td))
    };
    let list = PageList::parse(p, c.regs.r9, 0).map_err(fatal)?;
    let mut image = TdImage::of(p, td);
    let result = work.run(c, &mut stream, operands, list, &mut image);
    image.keep();
    if let Err(stop) = result {
        if let Stop::Interrupted(_) = stop {
            (c.regs.rcx, c.regs.rdx) = (rcx, rdx);
        }
        return Err(stop.on(td));
    }
    count_bundle(td);
    td.set_op_state(OpState::StateImport);
    Ok(())
}

fn count_bundle(td: &Td) {
    let mut m = td.migration();
    m.total_mb_count = m.total_mb_count.wrapping_add(1);
}

/// TDH.IMPORT.STATE.VP
pub(crate) fn vp(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (tdvpr_pa, rdx) = (c.regs.rcx, c.regs.rdx);
    (c.regs.rcx, c.regs.rdx) = (0, 0);
    let tdvpr = tdvpr(p, tdvpr_pa, LockMode::Exclusive, Operand::RCX)?;
    let vcpu = tdvpr.vcpu;
    let owner = implicit_tdr(p, vcpu.td_pa(), LockMode::Shared)?;
    let td = owner.td;
    let _op_state = c.td_state(td, true)?;
    check_pages(td, vcpu)?;
    let forward_streams = td.migration().num_migs.saturating_sub(1);
    let operand = StreamOperand::parse(c.regs.r10, forward_streams)?;
    let mut stream = td.streams.forward(operand.index).ok_or_else(stream_busy)?;
    let operands = [c.regs.r9, tdvpr_pa];
    let fatal = |status| td.import_failed(status);
    let work = if operand.command {
        let work = stream.resume_import(c.regs.rax, operands)?;
        if !matches!(vcpu.state(), VcpuState::Import | VcpuState::Disabled) {
            return Err(fatal(Code::VCPU_STATE_INCORRECT.status()));
        }
        associate(c, td, vcpu).map_err(fatal)?;
        work
    } else {
        start_vcpu(c, td, vcpu, &mut stream, operand.index).map_err(fatal)?
    };
    let list = PageList::parse(p, c.regs.r9, 3).map_err(fatal)?;
    let result = {
        let mut fields = VcpuFields {
            p,
            td,
            vcpu,
            ctx: &mut vcpu.context(),
            agent: Agent::Migration,
        };
        work.run(c, &mut stream, operands, list, &mut fields)
    };
    if let Err(stop) = result {
        if let Stop::Interrupted(_) = stop {
            (c.regs.rcx, c.regs.rdx) = (tdvpr_pa, rdx);
            vcpu.set_state(VcpuState::Import);
        }
        return Err(stop.on(td));
    }
    finish_vcpu(td, vcpu)
}

fn start_vcpu(
    c: &Call<'_, '_>,
    td: &Td,
    vcpu: &Vcpu,
    stream: &mut Stream,
    index: u16,
) -> Leaf<Incoming> {
    if !stream.is_initialised() {
        let key = td.migration().dec_working_key;
        stream.initialise(key);
    }
    if vcpu.state() != VcpuState::Uninitialized {
        return Err(Code::VCPU_STATE_INCORRECT.status());
    }
    let received = receive(c, td, stream, index, Kind::VcpuState)?;
    associate(c, td, vcpu)?;
    initialise_vcpu(c.p, td, vcpu);
    let context = meta::vcpu::context(td);
    Ok(Incoming::new(&received, Part::Mutable, context))
}

/// Counts the vCPU and makes it ready.
fn finish_vcpu(td: &Td, vcpu: &Vcpu) -> Leaf {
    let imported = {
        let mut m = td.migration();
        m.num_migrated_vcpus += 1;
        m.num_migrated_vcpus
    };
    if imported > td.num_vcpus.load(Ordering::Acquire) {
        return Err(td.import_failed(Code::ALL_VCPUS_IMPORTED.status()));
    }
    if let Some(id) = td.shared_x2apic_id(vcpu.index.load(Ordering::Acquire)) {
        td.set_op_state(OpState::FailedImport);
        return Err(Code::X2APIC_ID_NOT_UNIQUE.detail(id));
    }
    {
        let mut context = vcpu.context();
        context.adopt_ve_info();
        context.adopt_vectoring();
    }
    if vcpu.state() != VcpuState::Disabled {
        vcpu.set_state(VcpuState::Ready);
    }
    count_bundle(td);
    Ok(())
}
