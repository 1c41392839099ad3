//! The records of the protocol that carries a TD between hosts.

use alloc::vec::Vec;

use kvm_ops::{Gfn, PAGE_SIZE, VcpuId};
use kvm_ops_wire::{Fields, Layout, MigrateError, ProtocolError, Refusal};

use super::bundle::Bundle;
use super::{ExitState, MAX_STREAMS};

type Result<T> = core::result::Result<T, MigrateError>;

const PAGE: usize = PAGE_SIZE as usize;

/// Bytes of a Hello: the fewest and the most.
const HELLO: [usize; 2] = [
    16 + 8 + 2 + 4 + 1 + 2,
    16 + 8 + 2 + 4 + 1 + 2 + 16 * kvm_ops_wire::MAX_RANGES,
];

/// The most frames of a record.
pub(super) const MOST_FRAMES: usize = 512;

kvm_ops_wire::kinds! {
    b"KOMT", 3;
    /// Source: session and shape of the guest.
    Hello = 1, HELLO[0], HELLO[1];
    /// Source: goes on with a session after a broken link, or asks what became of it.
    Resume = 2, 16 + 8, 16 + 8;
    /// Target: its state and challenge.
    Ready = 3, 1 + 24, 1 + 24;
    /// Source: a bundle.
    Bundle = 4, 56, Bundle::MAX_BYTES;
    /// Source: a frame that the guest shares with its host; without data, zeros.
    Shared = 5, 8, 8 + PAGE;
    /// Source: a round is over.
    RoundEnd = 6, 4, 4;
    /// Target: it has all records up to here.
    RoundOk = 7, 0, 0;
    /// Source: asks for a word.
    Sync = 16, 0, 0;
    /// Target: it has all records up to here.
    Synced = 17, 0, 0;
    /// Source: what its host owes to a vCPU at the next entry.
    ExitState = 15, 4 + ExitState::MIN_BYTES, 4 + ExitState::MAX_BYTES;
    /// Source: only the start token is left.
    Prepare = 8, 0, 0;
    /// Target: it has everything but that.
    Prepared = 9, 0, 0;
    /// Source: the start token; the guest never runs there again without the target's word.
    Start = 10, 56, 56;
    /// Target: it runs the guest.
    Done = 11, 0, 0;
    /// Target: the abort token; it never ran the guest and never will.
    Returned = 12, 56, 56;
    /// Source: the migration is cancelled.
    Cancel = 13, 0, 0;
    /// Target: refuses and says why.
    Refuse = 14, Refusal::BYTES, Refusal::BYTES;
    /// Source: as Hello, for a guest that comes before its pages.
    HelloPostCopy = 18, HELLO[0], HELLO[1];
    /// Target: it runs the guest, and takes the pages that follow.
    Running = 19, 0, 0;
    /// Source: a turn is over; the number of pages that are left.
    Left = 20, 8, 8;
    /// Source: a turn is over, and every page was sent.
    Complete = 21, 0, 0;
    /// Target: it has all records up to here; frames for which the guest waits.
    Wanted = 22, 0, 8 * MOST_FRAMES;
    /// Source: those of them that it has no page for.
    Absent = 23, 8, 8 * MOST_FRAMES;
    /// Target: the guest is lost, and why.
    Lost = 24, Refusal::BYTES, Refusal::BYTES;
}

pub(super) type Wire<'l, L> = kvm_ops_wire::Wire<'l, L, Kind>;

/// A session's name: 128 random bits.
pub(super) type SessionId = [u8; 16];

/// The facts on which a target accepts or refuses a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The number of streams.
    pub streams: u16,
    /// The number of vCPUs.
    pub vcpus: u32,
    /// The width of guest-physical addresses, 48 or 52.
    pub gpaw: u8,
    /// The guest's memory: its slots.
    pub layout: Layout,
}

pub(super) fn hello(session: &SessionId, link: u64, shape: &Shape) -> Vec<u8> {
    let mut out = Vec::from(&session[..]);
    out.extend_from_slice(&link.to_le_bytes());
    out.extend_from_slice(&shape.streams.to_le_bytes());
    out.extend_from_slice(&shape.vcpus.to_le_bytes());
    out.push(shape.gpaw);
    shape.layout.encode(&mut out);
    out
}

/// The session and the number of the link, with which Hello and Resume begin.
pub(super) fn parse_session(payload: &[u8]) -> Result<(SessionId, u64)> {
    let mut fields = Fields::of(payload);
    Ok((fields.array()?, fields.u64()?))
}

/// The shape of a Hello, behind what [`parse_session`] takes.
pub(super) fn parse_hello(payload: &[u8]) -> Result<Shape> {
    let mut fields = Fields::of(payload);
    fields.bytes(16 + 8)?;
    let (streams, vcpus, gpaw) = (fields.u16()?, fields.u32()?, fields.u8()?);
    if streams == 0 || streams > MAX_STREAMS {
        return Err(ProtocolError::Field("number of streams").into());
    }
    if vcpus == 0 || vcpus > kvm_ops::MAX_VCPUS {
        return Err(ProtocolError::Field("number of vCPUs").into());
    }
    if !matches!(gpaw, 48 | 52) {
        return Err(ProtocolError::Field("width of guest-physical addresses").into());
    }
    let layout = fields.layout()?;
    fields.end()?;
    Ok(Shape {
        streams,
        vcpus,
        gpaw,
        layout,
    })
}

pub(super) fn bundle(bundle: &Bundle) -> Vec<u8> {
    let mut bytes = Vec::new();
    bundle.encode(&mut bytes);
    bytes
}

pub(super) fn parse_bundle(payload: &[u8]) -> Result<Bundle> {
    Bundle::decode(payload).map_err(|_| ProtocolError::Field("bundle").into())
}

/// A shared frame and its contents; `None` is a page of zeros.
pub(super) fn parse_shared(payload: &[u8]) -> Result<(Gfn, Option<&[u8; PAGE]>)> {
    let mut fields = Fields::of(payload);
    let gfn = Gfn::new(fields.u64()?);
    if fields.rest().is_empty() {
        return Ok((gfn, None));
    }
    let page = fields.rest().first_chunk::<PAGE>();
    fields.bytes(PAGE)?;
    fields.end()?;
    Ok((gfn, page))
}

/// Frames, 8 bytes each.
pub(super) fn frames<'f>(frames: impl IntoIterator<Item = &'f Gfn>) -> Vec<u8> {
    let words = frames.into_iter().map(|gfn| gfn.get().to_le_bytes());
    words.flatten().collect()
}

pub(super) fn parse_frames(payload: &[u8]) -> Result<Vec<Gfn>> {
    let (words, rest) = payload.as_chunks::<8>();
    if !rest.is_empty() {
        return Err(ProtocolError::Field("list of frames").into());
    }
    let frames = words.iter().map(|word| Gfn::new(u64::from_le_bytes(*word)));
    Ok(frames.collect())
}

pub(super) fn parse_exit_state(payload: &[u8]) -> Result<(VcpuId, ExitState)> {
    let mut fields = Fields::of(payload);
    let vcpu = fields.u32()?;
    let state = ExitState::decode(fields.rest()).map_err(|_| ProtocolError::Field("exit state"))?;
    Ok((VcpuId(vcpu), state))
}

/// A payload of the kind that is due; a target may refuse in place of any answer.
pub(super) fn expected(kind: Kind, payload: &[u8], due: Kind) -> Result<&[u8]> {
    match kind {
        Kind::Refuse => Err(MigrateError::Refused(Refusal::decode(payload)?)),
        kind if kind == due => Ok(payload),
        kind => Err(ProtocolError::Unexpected(kind as u8).into()),
    }
}
