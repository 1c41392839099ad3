//! The payloads of records.

use alloc::vec::Vec;

use kvm_ops::{Gfn, Tech};

use crate::Result;
use crate::ends::{Shape, VcpuContent};
use crate::frame::MAX_BLOB;
use crate::packet::{PACKET_HEADER, PAGE, Packet, PlatformCerts, SessionStart};
use kvm_ops_wire::{Challenge, Fields, MigrateError, ProtocolError, Reason, Refusal};

/// A session's name: 128 random bits.
pub(crate) type SessionId = [u8; 16];

const SEV: u8 = 1;
const SEV_ES: u8 = 2;

pub(crate) fn hello(session: &SessionId, link: u64, shape: &Shape) -> Result<Vec<u8>> {
    let tech = match shape.tech {
        Tech::Sev => SEV,
        Tech::SevEs => SEV_ES,
        _ => return Err(ProtocolError::Field("technology").into()),
    };
    let mut out = Vec::new();
    out.extend_from_slice(session);
    out.extend_from_slice(&link.to_le_bytes());
    out.push(tech);
    out.extend_from_slice(&shape.policy.to_le_bytes());
    out.extend_from_slice(&shape.vcpus.to_le_bytes());
    shape.layout.encode(&mut out);
    Ok(out)
}

/// The shape of a Hello, behind what [`parse_session`] takes.
pub(crate) fn parse_hello(payload: &[u8]) -> Result<Shape> {
    let mut fields = Fields::of(payload);
    fields.bytes(16 + 8)?;
    let tech = match fields.u8()? {
        SEV => Tech::Sev,
        SEV_ES => Tech::SevEs,
        _ => return Err(ProtocolError::Field("technology").into()),
    };
    let (policy, vcpus) = (fields.u32()?, fields.u32()?);
    if vcpus > kvm_ops::MAX_VCPUS {
        return Err(ProtocolError::Field("number of vCPUs").into());
    }
    let layout = fields.layout()?;
    fields.end()?;
    Ok(Shape {
        tech,
        policy,
        vcpus,
        layout,
    })
}

/// The session and the number of the link, with which Hello and Resume begin.
pub(crate) fn parse_session(payload: &[u8]) -> Result<(SessionId, u64)> {
    let mut fields = Fields::of(payload);
    Ok((fields.array()?, fields.u64()?))
}

fn blob(fields: &mut Fields<'_>, len: u32) -> Result<Vec<u8>> {
    if len as usize > MAX_BLOB {
        return Err(ProtocolError::Field("blob length").into());
    }
    Ok(fields.bytes(len as usize)?.to_vec())
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

pub(crate) fn offer(challenge: &Challenge, certs: &PlatformCerts) -> Vec<u8> {
    blobs(challenge, &[&certs.pdh, &certs.chain, &certs.vendor])
}

pub(crate) fn parse_offer(payload: &[u8]) -> Result<(Challenge, PlatformCerts)> {
    let mut fields = Fields::of(payload);
    let challenge = fields.array()?;
    let (pdh, chain, vendor) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let certs = PlatformCerts {
        pdh: blob(&mut fields, pdh)?,
        chain: blob(&mut fields, chain)?,
        vendor: blob(&mut fields, vendor)?,
    };
    fields.end()?;
    Ok((challenge, certs))
}

pub(crate) fn start(start: &SessionStart) -> Vec<u8> {
    blobs(&start.policy.to_le_bytes(), &[&start.pdh, &start.session])
}

pub(crate) fn parse_start(payload: &[u8]) -> Result<SessionStart> {
    let mut fields = Fields::of(payload);
    let (policy, pdh, session) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let start = SessionStart {
        policy,
        pdh: blob(&mut fields, pdh)?,
        session: blob(&mut fields, session)?,
    };
    fields.end()?;
    Ok(start)
}

fn packet_into(fields: &mut Fields<'_>, packet: &mut Packet) -> Result<()> {
    packet.header.copy_from_slice(fields.bytes(PACKET_HEADER)?);
    packet.data.copy_from_slice(fields.bytes(PAGE)?);
    Ok(())
}

pub(crate) fn parse_private(payload: &[u8], packet: &mut Packet) -> Result<Gfn> {
    let mut fields = Fields::of(payload);
    let gfn = fields.u64()?;
    packet_into(&mut fields, packet)?;
    fields.end()?;
    Ok(Gfn::new(gfn))
}

/// Returns the frame, and whether it has data, which is then in the packet.
pub(crate) fn parse_shared(payload: &[u8], packet: &mut Packet) -> Result<(Gfn, bool)> {
    let mut fields = Fields::of(payload);
    let gfn = Gfn::new(fields.u64()?);
    if fields.rest().is_empty() {
        return Ok((gfn, false));
    }
    packet.data.copy_from_slice(fields.bytes(PAGE)?);
    fields.end()?;
    Ok((gfn, true))
}

pub(crate) fn parse_absent(payload: &[u8]) -> Result<Gfn> {
    let mut fields = Fields::of(payload);
    let gfn = fields.u64()?;
    fields.end()?;
    Ok(Gfn::new(gfn))
}

const CLEAR: u8 = 0;
const VMSA: u8 = 1;

/// The head of a vCPU's record; its content follows.
pub(crate) fn vcpu_head(vcpu: u32, content: VcpuContent) -> [u8; 5] {
    let mut head = [0; 5];
    head[..4].copy_from_slice(&vcpu.to_le_bytes());
    head[4] = match content {
        VcpuContent::Clear(_) => CLEAR,
        VcpuContent::Vmsa => VMSA,
    };
    head
}

pub(crate) fn parse_vcpu(payload: &[u8], packet: &mut Packet) -> Result<(u32, VcpuContent)> {
    let mut fields = Fields::of(payload);
    let vcpu = fields.u32()?;
    match fields.u8()? {
        CLEAR => {
            let rest = fields.rest();
            let len = rest.len();
            if len > PAGE {
                return Err(ProtocolError::Field("payload length").into());
            }
            packet.data[..len].copy_from_slice(rest);
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

/// The refusal that tells the peer of an error here.
pub(crate) fn refusal_of(error: &MigrateError) -> Refusal {
    let mut refusal = Refusal::of(error);
    if refusal.reason == Reason::Firmware {
        // The status of the command is the low half of the word.
        refusal.status &= 0xffff_ffff;
    }
    refusal
}
