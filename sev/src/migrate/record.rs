//! The payloads of records, and how they are taken apart.

use alloc::vec::Vec;

use kvm_ops::{Gfn, Tech};

use super::ends::{Shape, VcpuContent};
use super::error::{MigrateError, ProtocolError, Reason, Refusal, Result};
use super::firmware::{Packet, PlatformCerts, SessionStart};
use super::frame::{MAX_BLOB, PACKET_HEADER, PAGE};
use super::layout::Layout;
use crate::Failure;

/// A session's name: 128 random bits.
pub(super) type SessionId = [u8; 16];

/// Takes a payload apart, front to back.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8]> {
        if len > self.0.len() {
            return Err(ProtocolError::Field("payload length").into());
        }
        let (head, tail) = self.0.split_at(len);
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N)?);
        Ok(out)
    }

    fn u8(&mut self) -> Result<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn blob(&mut self, len: u32) -> Result<Vec<u8>> {
        if len as usize > MAX_BLOB {
            return Err(ProtocolError::Field("blob length").into());
        }
        self.bytes(len as usize).map(Vec::from)
    }

    fn end(self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(ProtocolError::Field("payload length").into())
    }
}

const SEV: u8 = 1;
const SEV_ES: u8 = 2;

pub(super) fn hello(session: &SessionId, shape: &Shape) -> Result<Vec<u8>> {
    let tech = match shape.tech {
        Tech::Sev => SEV,
        Tech::SevEs => SEV_ES,
        _ => return Err(ProtocolError::Field("technology").into()),
    };
    let ranges = shape.layout.ranges();
    let mut out = Vec::with_capacity(27 + 16 * ranges.len());
    out.extend_from_slice(session);
    out.push(tech);
    out.extend_from_slice(&shape.policy.to_le_bytes());
    out.extend_from_slice(&shape.vcpus.to_le_bytes());
    out.extend_from_slice(&(ranges.len() as u16).to_le_bytes());
    for (first, pages) in ranges {
        out.extend_from_slice(&first.get().to_le_bytes());
        out.extend_from_slice(&pages.to_le_bytes());
    }
    Ok(out)
}

pub(super) fn parse_hello(payload: &[u8]) -> Result<(SessionId, Shape)> {
    let mut fields = Fields(payload);
    let session = fields.array()?;
    let tech = match fields.u8()? {
        SEV => Tech::Sev,
        SEV_ES => Tech::SevEs,
        _ => return Err(ProtocolError::Field("technology").into()),
    };
    let (policy, vcpus) = (fields.u32()?, fields.u32()?);
    if vcpus > kvm_ops::MAX_VCPUS {
        return Err(ProtocolError::Field("number of vCPUs").into());
    }
    let count = fields.u16()?;
    let mut ranges = Vec::new();
    for _ in 0..count {
        ranges.push((Gfn::new(fields.u64()?), fields.u64()?));
    }
    fields.end()?;
    let layout = Layout::new(ranges).map_err(|_| ProtocolError::Field("memory layout"))?;
    let shape = Shape {
        tech,
        policy,
        vcpus,
        layout,
    };
    Ok((session, shape))
}

pub(super) fn parse_session(payload: &[u8]) -> Result<SessionId> {
    let mut fields = Fields(payload);
    let session = fields.array()?;
    fields.end()?;
    Ok(session)
}

/// Lengths first, then the blobs.
fn blobs(head: &[u8], blobs: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::from(head);
    for blob in blobs {
        out.extend_from_slice(&(blob.len() as u32).to_le_bytes());
    }
    for blob in blobs {
        out.extend_from_slice(blob);
    }
    out
}

pub(super) fn offer(certs: &PlatformCerts) -> Vec<u8> {
    blobs(&[], &[&certs.pdh, &certs.chain, &certs.vendor])
}

pub(super) fn parse_offer(payload: &[u8]) -> Result<PlatformCerts> {
    let mut fields = Fields(payload);
    let (pdh, chain, vendor) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let certs = PlatformCerts {
        pdh: fields.blob(pdh)?,
        chain: fields.blob(chain)?,
        vendor: fields.blob(vendor)?,
    };
    fields.end()?;
    Ok(certs)
}

pub(super) fn start(start: &SessionStart) -> Vec<u8> {
    blobs(&start.policy.to_le_bytes(), &[&start.pdh, &start.session])
}

pub(super) fn parse_start(payload: &[u8]) -> Result<SessionStart> {
    let mut fields = Fields(payload);
    let (policy, pdh, session) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let start = SessionStart {
        policy,
        pdh: fields.blob(pdh)?,
        session: fields.blob(session)?,
    };
    fields.end()?;
    Ok(start)
}

/// Where a target stands, as its Ready tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Standing {
    /// It takes records.
    Receiving = 1,
    /// It has everything.
    Prepared = 2,
    /// The guest is its own.
    Owner = 3,
}

pub(super) fn parse_ready(payload: &[u8]) -> Result<Standing> {
    match payload {
        [1] => Ok(Standing::Receiving),
        [2] => Ok(Standing::Prepared),
        [3] => Ok(Standing::Owner),
        _ => Err(ProtocolError::Field("standing").into()),
    }
}

fn packet_into(fields: &mut Fields<'_>, packet: &mut Packet) -> Result<()> {
    packet.header.copy_from_slice(fields.bytes(PACKET_HEADER)?);
    packet.data.copy_from_slice(fields.bytes(PAGE)?);
    Ok(())
}

pub(super) fn parse_private(payload: &[u8], packet: &mut Packet) -> Result<Gfn> {
    let mut fields = Fields(payload);
    let gfn = fields.u64()?;
    packet_into(&mut fields, packet)?;
    fields.end()?;
    Ok(Gfn::new(gfn))
}

/// The frame, and whether it has data: the packet's then.
pub(super) fn parse_shared(payload: &[u8], packet: &mut Packet) -> Result<(Gfn, bool)> {
    let mut fields = Fields(payload);
    let gfn = Gfn::new(fields.u64()?);
    if fields.0.is_empty() {
        return Ok((gfn, false));
    }
    packet.data.copy_from_slice(fields.bytes(PAGE)?);
    fields.end()?;
    Ok((gfn, true))
}

pub(super) fn parse_absent(payload: &[u8]) -> Result<Gfn> {
    let mut fields = Fields(payload);
    let gfn = fields.u64()?;
    fields.end()?;
    Ok(Gfn::new(gfn))
}

const CLEAR: u8 = 0;
const VMSA: u8 = 1;

/// The head of a vCPU's record; its content follows.
pub(super) fn vcpu_head(vcpu: u32, content: VcpuContent) -> [u8; 5] {
    let mut head = [0; 5];
    head[..4].copy_from_slice(&vcpu.to_le_bytes());
    head[4] = match content {
        VcpuContent::Clear(_) => CLEAR,
        VcpuContent::Vmsa => VMSA,
    };
    head
}

pub(super) fn parse_vcpu(payload: &[u8], packet: &mut Packet) -> Result<(u32, VcpuContent)> {
    let mut fields = Fields(payload);
    let vcpu = fields.u32()?;
    match fields.u8()? {
        CLEAR => {
            let len = fields.0.len();
            if len > PAGE {
                return Err(ProtocolError::Field("payload length").into());
            }
            packet.data[..len].copy_from_slice(fields.0);
            Ok((vcpu, VcpuContent::Clear(len)))
        }
        VMSA => {
            packet_into(&mut fields, packet)?;
            fields.end()?;
            Ok((vcpu, VcpuContent::Vmsa))
        }
        _ => Err(ProtocolError::Field("kind of vCPU state").into()),
    }
}

pub(super) fn refuse(refusal: Refusal) -> [u8; 10] {
    let mut out = [0; 10];
    out[..2].copy_from_slice(&(refusal.reason as u16).to_le_bytes());
    out[2..].copy_from_slice(&refusal.status.to_le_bytes());
    out
}

pub(super) fn parse_refuse(payload: &[u8]) -> Result<Refusal> {
    let mut fields = Fields(payload);
    let reason =
        Reason::from_wire(fields.u16()?).ok_or(ProtocolError::Field("reason of a refusal"))?;
    let status = fields.u64()?;
    fields.end()?;
    Ok(Refusal { reason, status })
}

/// What the peer is told of an error here.
pub(super) fn refusal_of(error: &MigrateError) -> Refusal {
    let (reason, status) = match error {
        MigrateError::Step { error, .. } => match Failure::of(error) {
            Some(failure) => (Reason::Firmware, failure.code.into()),
            None => (Reason::Host, error.errno() as u64),
        },
        MigrateError::Protocol(ProtocolError::Session) => (Reason::Session, 0),
        MigrateError::WrongPhase => (Reason::Busy, 0),
        _ => (Reason::Damaged, 0),
    };
    Refusal { reason, status }
}
