//! Answering the messages of a guest.

use super::super::{Firmware, Outcome};
use super::SnpGuest;
use crate::attestation::{Report, SigningKey};
use crate::builder::TcbVersion;
use crate::command::SnpGuestRequest;
use crate::crypto::hmac_sha256;
use crate::machine::region::PAGE;
use crate::message::{
    self, GuestFieldSelect, Header, KeyRequest, KeyResponse, KeySel, MessageError, MessageType,
    ReportRequest, ReportResponse, RootKeySelect, TscInfoRequest, TscInfoResponse,
};
use crate::status::Status;
use zerocopy::{FromBytes, IntoBytes};

/// Highest sequence number of a message key.
const MAX_SEQUENCE: u64 = u32::MAX as u64;

impl Firmware<'_> {
    pub(super) fn guest_request(&mut self, context: u64, buffer: &SnpGuestRequest) -> Outcome {
        let request = self.small_page(buffer.request_paddr)?;
        let response = self.small_page(buffer.response_paddr)?;
        self.writable(response, PAGE as u64)?;
        let message = self.read_array::<PAGE>(request)?;
        let header = Header::parse(&message[..]).map_err(|_| Status::INVALID_PARAM)?;
        let vmpck = usize::from(header.vmpck);
        let guest = self.snp_guest(context)?;
        let (key, last) = (guest.vmpck[vmpck], guest.sequence[vmpck]);
        if last + 2 > MAX_SEQUENCE {
            return Err(Status::AEAD_OFLOW);
        }
        let (_, payload) = message::open(&key, &message[..]).map_err(|e| match e {
            MessageError::Authentication => Status::BAD_MEASUREMENT,
            _ => Status::INVALID_PARAM,
        })?;
        if header.sequence != last + 1 {
            return Err(Status::INVALID_PARAM);
        }
        let kind = MessageType::from_number(header.message_type);
        let kind = kind
            .filter(|k| k.response().is_some())
            .ok_or(Status::INVALID_PARAM)?;
        let vmpl = u32::from(header.vmpck);
        let answer = match kind {
            MessageType::ReportRequest => self.report(context, vmpl, &parse(&payload)?)?,
            MessageType::KeyRequest => {
                let answer = self.derived_key(context, vmpl, &parse(&payload)?)?;
                answer.as_bytes().to_vec()
            }
            MessageType::ExportRequest => {
                self.export(context, &parse(&payload)?).as_bytes().to_vec()
            }
            MessageType::ImportRequest => {
                self.import(context, &parse(&payload)?).as_bytes().to_vec()
            }
            MessageType::VmrkRequest => self
                .set_vmrk(context, &parse(&payload)?)
                .as_bytes()
                .to_vec(),
            _ => {
                let answer = self.tsc_info(context, &parse(&payload)?)?;
                answer.as_bytes().to_vec()
            }
        };
        let kind = kind.response().ok_or(Status::INVALID_PARAM)?;
        let sealed = message::seal(&key, header.vmpck, kind, header.sequence + 1, &answer)
            .map_err(|_| Status::INVALID_LEN)?;
        let mut page = [0; PAGE];
        page[..sealed.len()].copy_from_slice(&sealed);
        self.write(response, &page)?;
        self.snp_guest_mut(context)?.sequence[vmpck] = header.sequence + 1;
        Ok(())
    }

    /// A report request is 64 bytes of the guest's choice, a VMPL not above the key's, and the
    /// wanted signing key.
    fn report(&mut self, context: u64, vmpck: u32, request: &ReportRequest) -> Outcome<Vec<u8>> {
        let vmpl = request.vmpl.get();
        let signing_key = if vmpl < vmpck || vmpl > 3 {
            Err(Status::INVALID_PARAM)
        } else {
            self.signing_key(self.snp_guest(context)?, request.key_sel)
        };
        let signing_key = match signing_key {
            Ok(key) => key,
            Err(status) => {
                let head = ReportResponse {
                    status: u32::from(status.0).into(),
                    ..Default::default()
                };
                return Ok(head.as_bytes().to_vec());
            }
        };
        let report = self.signed_report(context, vmpl, request.user_data, signing_key)?;
        let head = ReportResponse {
            report_size: (Report::LEN as u32).into(),
            ..Default::default()
        };
        Ok([head.as_bytes(), &report].concat())
    }

    /// The key that signs a guest's report: what it asks for, if it is there and allowed.
    fn signing_key(&self, guest: &SnpGuest, wanted: KeySel) -> Outcome<SigningKey> {
        let vlek = self.sp.vlek.is_some();
        let vcek = !guest.identity.vcek_disabled;
        match wanted {
            KeySel::ANY | KeySel::VLEK if vlek => Ok(SigningKey::Vlek),
            KeySel::ANY | KeySel::VCEK if vcek && self.sp.tcb.mask_chip_key => Ok(SigningKey::None),
            KeySel::ANY | KeySel::VCEK if vcek => Ok(SigningKey::Vcek),
            KeySel::ANY | KeySel::VCEK | KeySel::VLEK => Err(Status::INVALID_KEY),
            _ => Err(Status::INVALID_PARAM),
        }
    }

    fn signed_report(
        &mut self,
        context: u64,
        vmpl: u32,
        report_data: [u8; 64],
        signing_key: SigningKey,
    ) -> Outcome<[u8; Report::LEN]> {
        const ONES: [u8; 32] = [0xff; 32];
        let guest = self.snp_guest(context)?;
        let (config, tcb) = (&self.machine.config, &self.sp.tcb);
        let block = guest.identity.block.as_ref();
        let options = self.sp.snp.unwrap_or_default();
        let report = Report {
            version: config.report_version,
            guest_svn: block.map_or(0, |b| b.guest_svn),
            policy: guest.policy.bits(),
            family_id: block.map_or([0; 16], |b| b.family_id),
            image_id: block.map_or([0; 16], |b| b.image_id),
            vmpl,
            current_tcb: config.tcb,
            platform_info: u64::from(config.smt)
                | u64::from(options.rapl_disabled) << 3
                | u64::from(options.max_snp_asid.is_some()) << 4,
            author_key_enabled: guest.identity.author_key_digest.is_some(),
            mask_chip_key: tcb.mask_chip_key,
            signing_key,
            report_data,
            measurement: guest.digest.value(),
            host_data: guest.identity.host_data,
            id_key_digest: guest.identity.id_key_digest.unwrap_or([0; 48]),
            author_key_digest: guest.identity.author_key_digest.unwrap_or([0; 48]),
            report_id: guest.report_id,
            report_id_ma: guest.launch.migration_agent.unwrap_or(ONES),
            reported_tcb: tcb.reported,
            cpuid_fms: (config.report_version >= 3).then_some(config.fms),
            chip_id: if tcb.mask_chip_id {
                [0; 64]
            } else {
                self.sp.identity.chip_id
            },
            committed_tcb: tcb.committed,
            current_version: config.api,
            committed_version: config.api,
            launch_tcb: guest.launch.tcb,
        };
        let mut bytes = report.to_bytes();
        let key = match (signing_key, &self.sp.vlek) {
            (SigningKey::Vcek, _) => Some(self.sp.identity.vcek(tcb.reported)),
            (SigningKey::Vlek, Some(seed)) => Some(seed.key(tcb.reported)),
            _ => None,
        };
        if let Some(key) = key {
            let signature = key.sign(&bytes[..Report::SIGNED]);
            bytes[Report::SIGNED..].copy_from_slice(&signature);
        }
        Ok(bytes)
    }

    /// A key derived from the chip and from the fields of its identity that the guest selects.
    fn derived_key(
        &mut self,
        context: u64,
        vmpck: u32,
        request: &KeyRequest,
    ) -> Outcome<KeyResponse> {
        let guest = self.snp_guest(context)?;
        let fields = request.guest_field_select;
        let vmpl = request.vmpl.get();
        let tcb = TcbVersion(request.tcb_version.get());
        let own_svn = guest.identity.block.map_or(0, |b| b.guest_svn);
        let refused = request.root_key_select.reserved() != 0
            || request.reserved != Default::default()
            || fields.reserved() != 0
            || vmpl < vmpck
            || vmpl > 3
            || (fields.contains(GuestFieldSelect::GUEST_SVN) && request.guest_svn.get() > own_svn)
            || (fields.contains(GuestFieldSelect::TCB_VERSION)
                && !tcb.is_at_most(self.sp.tcb.committed));
        if refused {
            return Ok(KeyResponse {
                status: u32::from(Status::INVALID_PARAM.0).into(),
                ..Default::default()
            });
        }
        let root = match request.root_key_select.contains(RootKeySelect::VMRK) {
            true => self.root_key(guest),
            false => self.sp.identity.chip_key(b"derived keys", &[]),
        };
        Ok(KeyResponse {
            derived_key: hmac_sha256(&root, &[&mixed(guest, request)]),
            ..Default::default()
        })
    }

    /// Scale and offset of the guest's TSC; only for guests launched with a secure TSC.
    fn tsc_info(&self, context: u64, _: &TscInfoRequest) -> Outcome<TscInfoResponse> {
        let launch = &self.snp_guest(context)?.launch;
        if !launch.secure_tsc {
            return Ok(TscInfoResponse {
                status: u32::from(Status::INVALID_PARAM.0).into(),
                ..Default::default()
            });
        }
        let own = u64::from(self.machine.config.tsc_khz.max(1));
        let desired = match launch.desired_tsc_khz {
            0 => own,
            khz => khz.into(),
        };
        // An 8.32 fixed-point ratio, as the TSC ratio of SVM has it.
        Ok(TscInfoResponse {
            tsc_scale: ((desired << 32) / own).into(),
            ..Default::default()
        })
    }
}

/// The structure of a request, which is as long as the payload.
fn parse<R: FromBytes>(payload: &[u8]) -> Outcome<R> {
    R::read_from_bytes(payload).map_err(|_| Status::INVALID_LEN)
}

/// Data mixed into a derived key; fields that were not selected are absent, not zero.
fn mixed(guest: &SnpGuest, request: &KeyRequest) -> Vec<u8> {
    let block = guest.identity.block.as_ref();
    let fields = request.guest_field_select;
    let mut out = fields.as_bytes().to_vec();
    out.extend_from_slice(request.vmpl.as_bytes());
    let mut field = |bit, bytes: &[u8]| {
        if fields.contains(bit) {
            out.extend_from_slice(bytes);
        }
    };
    field(GuestFieldSelect::GUEST_POLICY, guest.policy.as_bytes());
    field(
        GuestFieldSelect::IMAGE_ID,
        &block.map_or([0; 16], |b| b.image_id),
    );
    field(
        GuestFieldSelect::FAMILY_ID,
        &block.map_or([0; 16], |b| b.family_id),
    );
    field(GuestFieldSelect::MEASUREMENT, &guest.digest.value());
    field(GuestFieldSelect::GUEST_SVN, request.guest_svn.as_bytes());
    field(
        GuestFieldSelect::TCB_VERSION,
        request.tcb_version.as_bytes(),
    );
    out
}
