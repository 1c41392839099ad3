//! Byte patterns by which vectors describe pages and images.

use super::fields::{Outcome, bytes, narrow, number, text};
use crate::measure::{InitialVmsa, PAGE_SIZE, Vmm};
use serde_json::Value;

/// Far above any recorded image.
const MAX_LEN: usize = 256 << 20;

/// Fills `length` bytes as the pattern says and applies its patches.
pub(super) fn expand(pattern: &Value, length: usize) -> Outcome<Vec<u8>> {
    if length > MAX_LEN {
        return Err(format!("a pattern of {length:#x} bytes is too long"));
    }
    let mut out = base(pattern, length)?;
    for patch in pattern["patches"].as_array().into_iter().flatten() {
        let (at, data) = (narrow::<usize>(patch, "off")?, bytes(patch, "hex")?);
        at.checked_add(data.len())
            .and_then(|end| out.get_mut(at..end))
            .ok_or_else(|| format!("patch at {at:#x} runs out of the pattern"))?
            .copy_from_slice(&data);
    }
    Ok(out)
}

fn base(pattern: &Value, length: usize) -> Outcome<Vec<u8>> {
    let by_index = |f: &dyn Fn(usize) -> usize| (0..length).map(|i| f(i) as u8).collect();
    if pattern.get("zero").is_some() {
        Ok(vec![0; length])
    } else if pattern.get("fill").is_some() {
        Ok(vec![narrow(pattern, "fill")?; length])
    } else if pattern.get("index").is_some() {
        let k = number(pattern, "index")? as usize;
        Ok(by_index(&|i| i.wrapping_add(k)))
    } else if let Some(affine) = pattern.get("affine") {
        let parameter = |i: usize| {
            affine[i]
                .as_u64()
                .ok_or("affine needs two numbers".to_owned())
        };
        let (a, c) = (parameter(0)? as usize, parameter(1)? as usize);
        Ok(by_index(&|i| {
            a.wrapping_mul(i).wrapping_add(c).wrapping_add(i >> 8)
        }))
    } else if pattern.get("lcg").is_some() {
        let mut x = number(pattern, "lcg")? as u32;
        Ok((0..length)
            .map(|_| {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (x >> 24) as u8
            })
            .collect())
    } else if pattern.get("hex").is_some() {
        let mut out = bytes(pattern, "hex")?;
        if out.len() > length {
            return Err(format!("hex pattern is longer than {length:#x} bytes"));
        }
        out.resize(length, 0);
        Ok(out)
    } else if let Some(spec) = pattern.get("vmsa") {
        if length != PAGE_SIZE {
            return Err("a VMSA is one page".to_owned());
        }
        Ok(vmsa(spec)?.page().to_vec())
    } else {
        Err(format!("unknown pattern {pattern}"))
    }
}

/// The VMSA description of patterns and of the kind `vmsa_page`.
pub(super) fn vmsa(spec: &Value) -> Outcome<InitialVmsa> {
    Ok(InitialVmsa {
        eip: narrow(spec, "eip")?,
        vcpu_sig: narrow(spec, "vcpu_sig")?,
        sev_features: number(spec, "sev_features")?,
        vmm: vmm(spec)?,
    })
}

/// The `vmm` field; QEMU if there is none.
pub(super) fn vmm(spec: &Value) -> Outcome<Vmm> {
    match spec.get("vmm") {
        None => Ok(Vmm::Qemu),
        Some(_) => {
            let name = text(spec, "vmm")?;
            Vmm::from_name(name).ok_or_else(|| format!("unknown vmm {name:?}"))
        }
    }
}
