//! One function per kind of vector: input to values.

use super::fields::{
    Outcome, array, bytes, hex, narrow, narrow_or, number, number_or, optional, text, unhex,
};
use super::pattern;
use crate::crypto::{PacketContext, PacketHeader, PrivateKey, Session, TransportKeys, WrapKeys};
use crate::measure::{
    ApiVersion, IdAuth, IdBlock, KernelHashes, Launch, LaunchMeasure, PAGE_SIZE, PageInfo,
    PageType, SnpDigest, VMSA_GPA, VmplPermissions, sha384,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Bound on the pages of one chain operation, against inputs that would run for hours.
const MAX_PAGES: u64 = 1 << 20;
/// The same for the vCPUs of a launch.
const MAX_VCPUS: u32 = 1 << 16;

/// Recomputes the values of a vector and compares them with what it expects.
pub(super) fn check(vector: &Value) -> Outcome<()> {
    let kind = vector["kind"].as_str().ok_or("no kind")?;
    let input = &vector["input"];
    let got = match kind {
        "snp_chain" => snp_chain(input),
        "vmsa_page" => vmsa_page(input),
        "fw_digest" => fw_digest(input),
        "hash_table" => hash_table(input),
        "id_block" => id_block(input),
        "id_auth" => id_auth(input),
        "sev_launch_measure" => launch_measure(input),
        "sev_session" => session(input),
        "transport_packet" => packet(input),
        "ecdh_p384" => ecdh(input),
        other => Err(format!("unknown kind {other:?}")),
    }?;
    difference("", &vector["expect"], &got).map_or(Ok(()), Err)
}

/// The first difference between two values, with the place where it is.
fn difference(place: &str, expected: &Value, got: &Value) -> Option<String> {
    match (expected, got) {
        (Value::Object(e), Value::Object(g)) => {
            let unexpected = g.keys().find(|k| !e.contains_key(*k));
            e.iter()
                .find_map(|(k, v)| difference(&format!("{place}.{k}"), v, &got[k]))
                .or_else(|| {
                    unexpected.map(|k| differs(&format!("{place}.{k}"), &Value::Null, &g[k]))
                })
        }
        (Value::Array(e), Value::Array(g)) if e.len() == g.len() => e
            .iter()
            .zip(g)
            .enumerate()
            .find_map(|(i, (e, g))| difference(&format!("{place}[{i}]"), e, g)),
        _ => (expected != got).then(|| differs(place, expected, got)),
    }
}

fn differs(place: &str, expected: &Value, got: &Value) -> String {
    format!(
        "{}: expected {expected}, got {got}",
        place.trim_start_matches('.')
    )
}

fn hex_number(big_endian: &[u8]) -> String {
    let digits = hex(big_endian);
    let digits = digits.trim_start_matches('0');
    format!("0x{}", if digits.is_empty() { "0" } else { digits })
}

fn snp_chain(input: &Value) -> Outcome<Value> {
    let mut digest = match optional(input, "seed") {
        Some(_) => SnpDigest::from_value(array(input, "seed")?),
        None => SnpDigest::new(),
    };
    let mut trail = Vec::new();
    for op in input["ops"].as_array().ok_or("input ops is not a list")? {
        chain_op(op, &mut digest)?;
        trail.push(hex(&digest.value()));
    }
    Ok(json!({ "ld": hex(&digest.value()), "ld_after_each_op": trail }))
}

fn chain_op(op: &Value, digest: &mut SnpDigest) -> Outcome<()> {
    let page_type = match text(op, "type")? {
        "normal" => PageType::Normal,
        "vmsa" => PageType::Vmsa,
        "zero" => PageType::Zero,
        "unmeasured" => PageType::Unmeasured,
        "secrets" => PageType::Secrets,
        "cpuid" => PageType::Cpuid,
        other => return Err(format!("unknown page type {other:?}")),
    };
    let pages = number_or(op, "pages", 1)?;
    if pages > MAX_PAGES {
        return Err(format!("{pages} pages in one operation are too many"));
    }
    let mut info = PageInfo {
        page_type,
        gpa: number(op, "gpa")?,
        imi: narrow_or::<u8>(op, "imi", 0)? & 1 == 1,
        permissions: VmplPermissions {
            vmpl1: narrow_or(op, "vmpl1", 0)?,
            vmpl2: narrow_or(op, "vmpl2", 0)?,
            vmpl3: narrow_or(op, "vmpl3", 0)?,
        },
    };
    let data = match page_type.measures_content() {
        true => pattern::expand(&op["data"], pages as usize * PAGE_SIZE)?,
        false => Vec::new(),
    };
    let mut page = [0; PAGE_SIZE];
    for i in 0..pages as usize {
        if page_type.measures_content() {
            page.copy_from_slice(&data[i * PAGE_SIZE..(i + 1) * PAGE_SIZE]);
        }
        digest.add_page(&info, &page);
        info.gpa = info.gpa.wrapping_add(PAGE_SIZE as u64);
    }
    Ok(())
}

fn vmsa_page(input: &Value) -> Outcome<Value> {
    let page = pattern::vmsa(input)?.page();
    let mut digest = SnpDigest::new();
    digest.add_page(&PageInfo::new(PageType::Vmsa, VMSA_GPA), &page);
    Ok(json!({
        "sha256": hex(&Sha256::digest(&page[..])),
        "sha384": hex(&sha384(&page[..])),
        "nonzero": nonzero_runs(&page[..]),
        "ld_of_this_page_alone": hex(&digest.value()),
    }))
}

/// Runs that begin with a nonzero byte and end before four zero bytes.
fn nonzero_runs(bytes: &[u8]) -> Vec<Value> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == 0 {
            at += 1;
            continue;
        }
        let mut end = at;
        while bytes[end..].iter().take(4).any(|b| *b != 0) {
            end += 1;
        }
        runs.push(json!([at, hex(&bytes[at..end])]));
        at = end;
    }
    runs
}

fn kernel_hashes(input: &Value) -> Outcome<Option<KernelHashes>> {
    if optional(input, "kernel_utf8").is_none() {
        return Ok(None);
    }
    let append = optional(input, "append")
        .map(|_| text(input, "append"))
        .transpose()?;
    let initrd = match optional(input, "initrd_utf8") {
        Some(_) => text(input, "initrd_utf8")?,
        None => "",
    };
    let kernel = text(input, "kernel_utf8")?;
    Ok(Some(KernelHashes::new(
        kernel.as_bytes(),
        initrd.as_bytes(),
        append,
    )))
}

fn fw_digest(input: &Value) -> Outcome<Value> {
    let size = narrow(&input["image"], "size")?;
    let image = pattern::expand(&input["image"]["pattern"], size)?;
    let vcpus = narrow_or(input, "vcpus", 1)?;
    if vcpus > MAX_VCPUS {
        return Err(format!("{vcpus} vcpus are too many"));
    }
    let mut launch = Launch::new(&image)
        .vcpus(vcpus)
        .vcpu_sig(narrow_or(input, "vcpu_sig", 0)?)
        .guest_features(number_or(input, "guest_features", 0)?)
        .vmm(pattern::vmm(input)?);
    if let Some(hashes) = kernel_hashes(input)? {
        launch = launch.kernel_hashes(hashes);
    }
    let mut out = json!({ "image_sha256": hex(&Sha256::digest(&image)) });
    let digest = match text(input, "mode")? {
        "sev" => hex(&launch.sev().map_err(describe)?),
        "sev-es" => hex(&launch.sev_es().map_err(describe)?),
        "snp" => {
            out["base_gpa"] = format!("{:#x}", launch.image_gpa().map_err(describe)?).into();
            let image_digest = launch.snp_image().map_err(describe)?;
            out["ld_after_image"] = hex(&image_digest.value()).into();
            hex(&launch.snp().map_err(describe)?)
        }
        other => return Err(format!("unknown mode {other:?}")),
    };
    out["digest"] = digest.into();
    Ok(out)
}

fn describe(error: impl std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

fn hash_table(input: &Value) -> Outcome<Value> {
    let hashes = kernel_hashes(input)?.ok_or("no kernel")?;
    let offset = narrow(input, "offset_in_page")?;
    let page = hashes
        .page(offset)
        .ok_or("the table does not fit the page")?;
    Ok(json!({ "table": hex(&hashes.table()), "page_sha384": hex(&sha384(&page[..])) }))
}

fn id_block(input: &Value) -> Outcome<Value> {
    let block = IdBlock {
        launch_digest: array(input, "ld")?,
        family_id: array(input, "family_id")?,
        image_id: array(input, "image_id")?,
        version: narrow(input, "version")?,
        guest_svn: narrow(input, "guest_svn")?,
        policy: number(input, "policy")?,
    }
    .to_bytes();
    Ok(json!({ "block": hex(&block), "sha384": hex(&sha384(&block)) }))
}

fn private_key(input: &Value, name: &str) -> Outcome<PrivateKey> {
    let digits = text(input, name)?
        .strip_prefix("0x")
        .ok_or_else(|| format!("input {name} has no 0x"))?;
    let padded = if digits.len() % 2 == 1 {
        format!("0{digits}")
    } else {
        digits.to_owned()
    };
    let mut scalar = unhex(&padded)?;
    let zeros = scalar.iter().take_while(|b| **b == 0).count();
    scalar.drain(..zeros);
    PrivateKey::from_scalar(&scalar).ok_or_else(|| format!("input {name} is not a scalar"))
}

fn id_auth(input: &Value) -> Outcome<Value> {
    let block = IdBlock::from_bytes(&array(input, "id_block")?);
    let id_key = private_key(input, "id_private_scalar")?;
    let author = optional(input, "author_private_scalar")
        .map(|_| private_key(input, "author_private_scalar"))
        .transpose()?;
    let auth = IdAuth::sign(&block, &id_key, author.as_ref());
    let scalar = |signature: &[u8], place: usize| {
        let mut bytes = signature[place * 72..(place + 1) * 72].to_vec();
        bytes.reverse();
        hex_number(&bytes)
    };
    let mut out = json!({
        "id_key_digest": hex(&auth.id_key_digest()),
        "block_sig_r": scalar(auth.block_signature(), 0),
        "block_sig_s": scalar(auth.block_signature(), 1),
        "id_auth_sha384": hex(&sha384(auth.as_bytes())),
    });
    if auth.has_author() {
        out["author_key_digest"] = hex(&auth.author_key_digest()).into();
        out["id_key_sig_r"] = scalar(auth.key_signature(), 0).into();
        out["id_key_sig_s"] = scalar(auth.key_signature(), 1).into();
    }
    Ok(out)
}

fn launch_measure(input: &Value) -> Outcome<Value> {
    let version = ApiVersion {
        major: narrow(input, "api_major")?,
        minor: narrow(input, "api_minor")?,
        build: narrow(input, "build")?,
    };
    let measure = LaunchMeasure::compute(
        &array(input, "tik")?,
        version,
        narrow(input, "policy")?,
        &array(input, "launch_digest")?,
        array(input, "mnonce")?,
    );
    Ok(json!({ "measure": hex(&measure.measure), "blob": hex(&measure.to_bytes()) }))
}

fn transport_keys(input: &Value) -> Outcome<TransportKeys> {
    Ok(TransportKeys {
        tek: array(input, "tek")?,
        tik: array(input, "tik")?,
    })
}

fn session(input: &Value) -> Outcome<Value> {
    let (z, nonce) = (bytes(input, "z")?, array(input, "nonce")?);
    let policy = narrow(input, "policy")?;
    let keys = transport_keys(input)?;
    let session = Session::seal(&z, nonce, array(input, "wrap_iv")?, &keys, policy);
    if session.open(&z, policy) != Ok(keys) {
        return Err("the session does not open again".to_owned());
    }
    let wrap = WrapKeys::derive(&z, &nonce);
    Ok(json!({
        "master": hex(&wrap.master),
        "kek": hex(&wrap.kek),
        "kik": hex(&wrap.kik),
        "wrap_tk": hex(&session.wrap_tk),
        "wrap_mac": hex(&session.wrap_mac),
        "policy_mac": hex(&session.policy_mac),
        "session": hex(&session.to_bytes()),
    }))
}

fn packet(input: &Value) -> Outcome<Value> {
    let context = match number(input, "context")? {
        1 => PacketContext::LaunchSecret,
        2 => PacketContext::UpdateData,
        3 => PacketContext::UpdateVmsa,
        other => return Err(format!("unknown packet context {other}")),
    };
    let keys = transport_keys(input)?;
    let plain = pattern::expand(&input["data"]["pattern"], narrow(&input["data"], "len")?)?;
    let tail = bytes(input, "mac_tail")?;
    let (flags, iv) = (narrow(input, "flags")?, array(input, "iv")?);
    let mut data = plain.clone();
    let header = PacketHeader::seal(context, &keys, flags, iv, &mut data, &tail);
    let out = json!({
        "header": hex(&header.to_bytes()),
        "mac": hex(&header.mac),
        "ciphertext": hex(&data),
    });
    if header.open(context, &keys, &mut data, &tail).is_err() || data != plain {
        return Err("the packet does not open again".to_owned());
    }
    Ok(out)
}

fn ecdh(input: &Value) -> Outcome<Value> {
    let (a, b) = (
        private_key(input, "scalar_a")?,
        private_key(input, "scalar_b")?,
    );
    let z = a.ecdh(&b.public());
    if z != b.ecdh(&a.public()) {
        return Err("the two sides do not agree on z".to_owned());
    }
    Ok(json!({
        "z": hex(&z),
        "pub_a_x": hex_number(&a.public().x()),
        "pub_b_x": hex_number(&b.public().x()),
    }))
}
