//! TDH.EXPORT.STATE.IMMUTABLE, TD and VP

use crate::call::{Call, Leaf, associate, check_pages, implicit_tdr, tdr, tdvpr};
use crate::lock::LockMode;
use crate::meta;
use crate::meta::list::{self, Element};
use crate::meta::place::{Context, Place};
use crate::meta::table::{Agent, Field, Table};
use crate::meta::vcpu::VcpuFields;
use crate::migrate::bundle::{Bundle, ListPage, PageList, Progress};
use crate::migrate::fields::Part;
use crate::migrate::interrupt::Work;
use crate::migrate::mbmd::{Kind, Mbmd, Specific};
use crate::migrate::operands::{MbmdBuffer, StreamOperand, lock_migration, stream_busy};
use crate::migrate::stream::Stream;
use crate::op_state::OpState;
use crate::platform::Platform;
use crate::status::{Code, Operand};
use crate::td::{ATTR_MIGRATABLE, Td};

use std::sync::atomic::Ordering;

/// Pages of the immutable state that hold the exporter's SYS fields.
const SYS_PAGES: u8 = 1;
/// An EXPORT_COUNT that cannot be counted further.
const MAX_EXPORTS: u32 = 0x7FFF_FFFF;

/// A state bundle under export, and the field its next page starts with.
pub(crate) struct Outgoing {
    bundle: Bundle,
    cursor: Cursor,
}

struct Cursor {
    part: Part,
    context: Context,
    next: Option<Place>,
}

impl Outgoing {
    fn new(mbmd: Mbmd, part: Part, context: Context) -> Self {
        Outgoing {
            bundle: Bundle::new(mbmd),
            cursor: Cursor {
                part,
                context,
                next: first_field(part, context),
            },
        }
    }

    /// Exports pages until the bundle is complete or the call is interrupted.
    fn run(
        mut self,
        c: &mut Call<'_, '_>,
        stream: &mut Stream,
        operands: [u64; 2],
        list: PageList,
        source: &impl Source,
    ) -> Leaf<Self> {
        let Some(key) = stream.key() else {
            return Err(Code::MIGRATION_STREAM_STATE_INCORRECT.status());
        };
        let (bundle, cursor) = (&mut self.bundle, &mut self.cursor);
        let progress = bundle.export_pages(c, key, list, |page| cursor.fill(page, source));
        let pages = u64::from(bundle.pages());
        match progress? {
            Progress::Complete => Ok(self),
            Progress::Interrupted => {
                c.regs.rdx = pages;
                let work = Work::Export {
                    operands,
                    work: self,
                };
                Err(stream.interrupt(c.regs.rax, work))
            }
        }
    }

    /// Writes the MBMD of the complete bundle; RDX counts the pages.
    fn finish(&self, c: &mut Call<'_, '_>, stream: &Stream, out: MbmdBuffer) {
        c.regs.rdx = u64::from(self.bundle.pages());
        if let Some(key) = stream.key() {
            out.write(c.p, &self.bundle.sealed_mbmd(key));
        }
    }
}

impl Cursor {
    /// Fills the next page. False if it is the last.
    fn fill(&mut self, page: &mut ListPage, source: &impl Source) -> bool {
        let part = self.part;
        if let Some(from) = self.next {
            let mask = |f: &Field| part.exported_bits(f);
            self.next = list::write(self.context, from, page, mask, |place| source.load(place));
        }
        if self.next.is_none() && self.context == Context::Sys {
            // The fields of the TD follow those of the module, on a new page.
            self.context = meta::td::context(source.td());
            self.next = first_field(part, self.context);
        }
        self.next.is_some()
    }
}

/// TDH.EXPORT.STATE.IMMUTABLE
pub(crate) fn immutable(c: &mut Call<'_, '_>) -> Leaf {
    const LEAST_LAST: u16 = 3;
    let p = c.p;
    c.regs.rdx = 0;
    let tdr = tdr(p, c.regs.rcx, LockMode::Shared, Operand::RCX)?;
    let td = tdr.td;
    let _op_state = c.td_state_in(td, Some(LockMode::Exclusive))?;
    let _mig = lock_migration(td, LockMode::Exclusive)?;
    if td.attributes() & ATTR_MIGRATABLE == 0 {
        return Err(Code::TD_NOT_MIGRATABLE.status());
    }
    let (mig_count, num_migs) = {
        let m = td.migration();
        (m.mig_count, m.num_migs)
    };
    if mig_count != 0 {
        return Err(Code::PREVIOUS_EXPORT_CLEANUP_INCOMPLETE.status());
    }
    if num_migs < 2 {
        return Err(Code::MIN_MIGS_NOT_CREATED.status());
    }
    let out = MbmdBuffer::parse(p, c.regs.r8)?;
    let operand = StreamOperand::parse_first(c.regs.r10)?;
    let mut stream = td.streams.forward(0).ok_or_else(stream_busy)?;
    let (work, list) = if operand.command {
        resume(c, &mut stream, 0)?
    } else {
        let list = PageList::parse(p, c.regs.r9, LEAST_LAST)?;
        (start_session(c, td, &mut stream)?, list)
    };
    let work = work.run(c, &mut stream, [c.regs.r9, 0], list, &TdFields { p, td })?;
    work.finish(c, &stream, out);
    td.migration().total_mb_count = 1;
    stream.next_mb = 1;
    td.set_op_state(OpState::LiveExport);
    Ok(())
}

/// Begins an export session: the keys the migration TD has set come into use.
fn start_session(c: &Call<'_, '_>, td: &Td, stream: &mut Stream) -> Leaf<Outgoing> {
    let mut m = td.migration();
    m.begin_session(&c.p.machine, c.p.cfg.rdseed_tries)?;
    m.dirty_count = 0;
    td.streams.forget_others(0);
    stream.initialise(m.enc_working_key);
    let iv_counter = stream.next_iv();
    if m.export_count >= MAX_EXPORTS {
        return Err(Code::MAX_EXPORTS_EXCEEDED.status());
    }
    m.export_count += 1;
    let mbmd = Mbmd {
        version: m.working_version,
        stream: 0,
        kind: Kind::Immutable,
        mb_counter: 0,
        epoch: 0,
        iv_counter,
        specific: Specific::Immutable {
            forward_streams: m.num_migs - 1,
            sys_pages: SYS_PAGES,
        },
    };
    Ok(Outgoing::new(mbmd, Part::Immutable, Context::Sys))
}

/// TDH.EXPORT.STATE.TD
pub(crate) fn td(c: &mut Call<'_, '_>) -> Leaf {
    const LEAST_LAST: u16 = 1;
    let p = c.p;
    c.regs.rdx = 0;
    let tdr = tdr(p, c.regs.rcx, LockMode::Shared, Operand::RCX)?;
    let td = tdr.td;
    let _op_state = c.td_state_in(td, Some(LockMode::Exclusive))?;
    let operand = StreamOperand::parse_first(c.regs.r10)?;
    let mut stream = td.streams.forward(0).ok_or_else(stream_busy)?;
    if !stream.is_initialised() {
        return Err(Code::MIGRATION_STREAM_STATE_INCORRECT.status());
    }
    let (work, list) = if operand.command {
        resume(c, &mut stream, 0)?
    } else {
        let list = PageList::parse(p, c.regs.r9, LEAST_LAST)?;
        let mbmd = mbmd(td, &mut stream, 0, Kind::TdState, Specific::None);
        let context = meta::td::context(td);
        (Outgoing::new(mbmd, Part::Mutable, context), list)
    };
    let work = work.run(c, &mut stream, [c.regs.r9, 0], list, &TdFields { p, td })?;
    let out = MbmdBuffer::parse(p, c.regs.r8)?;
    work.finish(c, &stream, out);
    count_bundle(td, &mut stream);
    Ok(())
}

/// TDH.EXPORT.STATE.VP
pub(crate) fn vp(c: &mut Call<'_, '_>) -> Leaf {
    const LEAST_LAST: u16 = 4;
    let p = c.p;
    let tdvpr_pa = c.regs.rcx;
    c.regs.rdx = 0;
    let tdvpr = tdvpr(p, tdvpr_pa, LockMode::Exclusive, Operand::RCX)?;
    let vcpu = tdvpr.vcpu;
    let owner = implicit_tdr(p, vcpu.td_pa(), LockMode::Shared)?;
    let td = owner.td;
    let _op_state = c.td_state(td, true)?;
    check_pages(td, vcpu)?;
    associate(c, td, vcpu)?;
    let m = *td.migration();
    if vcpu.export_count.load(Ordering::Acquire) == m.export_count {
        return Err(Code::VCPU_ALREADY_EXPORTED.status());
    }
    let operand = StreamOperand::parse(c.regs.r10, m.num_migs.saturating_sub(1))?;
    let mut stream = td.streams.forward(operand.index).ok_or_else(stream_busy)?;
    let (work, list) = if operand.command {
        resume(c, &mut stream, tdvpr_pa)?
    } else {
        let list = PageList::parse(p, c.regs.r9, LEAST_LAST)?;
        if !stream.is_initialised() {
            stream.initialise(m.enc_working_key);
        }
        let index = vcpu.index.load(Ordering::Acquire) as u16;
        let specific = Specific::Vcpu { index };
        let mbmd = mbmd(td, &mut stream, operand.index, Kind::VcpuState, specific);
        let context = meta::vcpu::context(td);
        (Outgoing::new(mbmd, Part::Mutable, context), list)
    };
    let mut context = vcpu.context();
    let source = VcpuFields {
        p,
        td,
        vcpu,
        ctx: &mut context,
        agent: Agent::Migration,
    };
    let work = work.run(c, &mut stream, [c.regs.r9, tdvpr_pa], list, &source)?;
    let out = MbmdBuffer::parse(p, c.regs.r8)?;
    work.finish(c, &stream, out);
    count_bundle(td, &mut stream);
    vcpu.export_count.store(m.export_count, Ordering::Release);
    Ok(())
}

/// The bundle an interrupted call was working on.
fn resume(c: &Call<'_, '_>, stream: &mut Stream, tdvpr: u64) -> Leaf<(Outgoing, PageList)> {
    let r9 = c.regs.r9;
    let work = stream.resume_export(c.regs.rax, [r9, tdvpr])?;
    Ok((work, PageList::parse(c.p, r9, 0)?))
}

/// The MBMD of a bundle in the running session.
fn mbmd(td: &Td, stream: &mut Stream, index: u16, kind: Kind, specific: Specific) -> Mbmd {
    let m = td.migration();
    Mbmd {
        version: m.working_version,
        stream: index,
        kind,
        mb_counter: stream.next_mb,
        epoch: m.mig_epoch,
        iv_counter: stream.next_iv(),
        specific,
    }
}

fn count_bundle(td: &Td, stream: &mut Stream) {
    stream.next_mb = stream.next_mb.wrapping_add(1);
    let mut m = td.migration();
    m.total_mb_count = m.total_mb_count.wrapping_add(1);
}

/// Fields that an export reads: the module's and a TD's.
struct TdFields<'a> {
    p: &'a Platform,
    td: &'a Td,
}

/// The fields an export reads.
trait Source {
    /// The TD they belong to.
    fn td(&self) -> &Td;
    fn load(&self, place: &Place) -> Element;
}

fn first_field(part: Part, context: Context) -> Option<Place> {
    context.first(|f| part.exported_bits(f))
}

impl Source for TdFields<'_> {
    fn td(&self) -> &Td {
        self.td
    }

    fn load(&self, place: &Place) -> Element {
        match place.table {
            Table::Sys => Element::Value(meta::sys::value(&self.p.cfg, place)),
            _ if meta::td::is_without_value(self.td, place) => Element::Absent,
            _ => Element::Value(meta::td::value(self.p, self.td, place)),
        }
    }
}

impl Source for VcpuFields<'_> {
    fn td(&self) -> &Td {
        self.td
    }

    fn load(&self, place: &Place) -> Element {
        Element::Value(self.value(place))
    }
}
