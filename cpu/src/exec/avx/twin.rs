//! Instructions that do to each half of their operands what one of SSE does.

use iced_x86::{Code as C, Instruction, Mnemonic as M, OpKind, Register};

use super::{Halves, halves};
use crate::exec::{Exec, vector};
use crate::fpu::SCRATCH;
use crate::state::{Core, R};

/// The operands of a twin.
const TO: Register = Register::XMM16;
const FROM: Register = Register::XMM17;

pub(super) fn select(i: &Instruction) -> Option<Exec> {
    let m = i.mnemonic();
    if packed(m).is_some() {
        return Some(each);
    }
    if widening(m).is_some() {
        return Some(widen);
    }
    if narrowing(m).is_some() {
        return Some(narrow);
    }
    if shift(m).is_some() {
        return Some(shifts);
    }
    if general(i).is_some() {
        return Some(to_general);
    }
    if text(i.mnemonic()).is_some() {
        return Some(texts);
    }
    inserting(i).map(|_| insert as Exec)
}

/// Twins whose first operand is read too, and whose result is ECX or XMM0.
fn text(m: M) -> Option<C> {
    Some(match m {
        M::Vpcmpestri => C::Pcmpestri_xmm_xmmm128_imm8,
        M::Vpcmpestri64 => C::Pcmpestri64_xmm_xmmm128_imm8,
        M::Vpcmpestrm => C::Pcmpestrm_xmm_xmmm128_imm8,
        M::Vpcmpestrm64 => C::Pcmpestrm64_xmm_xmmm128_imm8,
        M::Vpcmpistri => C::Pcmpistri_xmm_xmmm128_imm8,
        M::Vpcmpistrm => C::Pcmpistrm_xmm_xmmm128_imm8,
        _ => return None,
    })
}

/// Twins whose second operand is a vector as wide as the first, or its lowest lane.
fn packed(m: M) -> Option<C> {
    Some(match m {
        M::Vaddpd => C::Addpd_xmm_xmmm128,
        M::Vaddps => C::Addps_xmm_xmmm128,
        M::Vaddsd => C::Addsd_xmm_xmmm64,
        M::Vaddss => C::Addss_xmm_xmmm32,
        M::Vaddsubpd => C::Addsubpd_xmm_xmmm128,
        M::Vaddsubps => C::Addsubps_xmm_xmmm128,
        M::Vaesdec => C::Aesdec_xmm_xmmm128,
        M::Vaesdeclast => C::Aesdeclast_xmm_xmmm128,
        M::Vaesenc => C::Aesenc_xmm_xmmm128,
        M::Vaesenclast => C::Aesenclast_xmm_xmmm128,
        M::Vaesimc => C::Aesimc_xmm_xmmm128,
        M::Vaeskeygenassist => C::Aeskeygenassist_xmm_xmmm128_imm8,
        M::Vandnpd => C::Andnpd_xmm_xmmm128,
        M::Vandnps => C::Andnps_xmm_xmmm128,
        M::Vandpd => C::Andpd_xmm_xmmm128,
        M::Vandps => C::Andps_xmm_xmmm128,
        M::Vblendpd => C::Blendpd_xmm_xmmm128_imm8,
        M::Vblendps => C::Blendps_xmm_xmmm128_imm8,
        M::Vcmppd => C::Cmppd_xmm_xmmm128_imm8,
        M::Vcmpps => C::Cmpps_xmm_xmmm128_imm8,
        M::Vcmpsd => C::Cmpsd_xmm_xmmm64_imm8,
        M::Vcmpss => C::Cmpss_xmm_xmmm32_imm8,
        M::Vcvtdq2ps => C::Cvtdq2ps_xmm_xmmm128,
        M::Vcvtps2dq => C::Cvtps2dq_xmm_xmmm128,
        M::Vcvtsd2ss => C::Cvtsd2ss_xmm_xmmm64,
        M::Vcvtss2sd => C::Cvtss2sd_xmm_xmmm32,
        M::Vcvttps2dq => C::Cvttps2dq_xmm_xmmm128,
        M::Vdivpd => C::Divpd_xmm_xmmm128,
        M::Vdivps => C::Divps_xmm_xmmm128,
        M::Vdivsd => C::Divsd_xmm_xmmm64,
        M::Vdivss => C::Divss_xmm_xmmm32,
        M::Vdppd => C::Dppd_xmm_xmmm128_imm8,
        M::Vdpps => C::Dpps_xmm_xmmm128_imm8,
        M::Vgf2p8affineinvqb => C::Gf2p8affineinvqb_xmm_xmmm128_imm8,
        M::Vgf2p8affineqb => C::Gf2p8affineqb_xmm_xmmm128_imm8,
        M::Vgf2p8mulb => C::Gf2p8mulb_xmm_xmmm128,
        M::Vhaddpd => C::Haddpd_xmm_xmmm128,
        M::Vhaddps => C::Haddps_xmm_xmmm128,
        M::Vhsubpd => C::Hsubpd_xmm_xmmm128,
        M::Vhsubps => C::Hsubps_xmm_xmmm128,
        M::Vinsertps => C::Insertps_xmm_xmmm32_imm8,
        M::Vmaxpd => C::Maxpd_xmm_xmmm128,
        M::Vmaxps => C::Maxps_xmm_xmmm128,
        M::Vmaxsd => C::Maxsd_xmm_xmmm64,
        M::Vmaxss => C::Maxss_xmm_xmmm32,
        M::Vminpd => C::Minpd_xmm_xmmm128,
        M::Vminps => C::Minps_xmm_xmmm128,
        M::Vminsd => C::Minsd_xmm_xmmm64,
        M::Vminss => C::Minss_xmm_xmmm32,
        M::Vmpsadbw => C::Mpsadbw_xmm_xmmm128_imm8,
        M::Vmulpd => C::Mulpd_xmm_xmmm128,
        M::Vmulps => C::Mulps_xmm_xmmm128,
        M::Vmulsd => C::Mulsd_xmm_xmmm64,
        M::Vmulss => C::Mulss_xmm_xmmm32,
        M::Vorpd => C::Orpd_xmm_xmmm128,
        M::Vorps => C::Orps_xmm_xmmm128,
        M::Vpabsb => C::Pabsb_xmm_xmmm128,
        M::Vpabsd => C::Pabsd_xmm_xmmm128,
        M::Vpabsw => C::Pabsw_xmm_xmmm128,
        M::Vpackssdw => C::Packssdw_xmm_xmmm128,
        M::Vpacksswb => C::Packsswb_xmm_xmmm128,
        M::Vpackusdw => C::Packusdw_xmm_xmmm128,
        M::Vpackuswb => C::Packuswb_xmm_xmmm128,
        M::Vpaddb => C::Paddb_xmm_xmmm128,
        M::Vpaddd => C::Paddd_xmm_xmmm128,
        M::Vpaddq => C::Paddq_xmm_xmmm128,
        M::Vpaddsb => C::Paddsb_xmm_xmmm128,
        M::Vpaddsw => C::Paddsw_xmm_xmmm128,
        M::Vpaddusb => C::Paddusb_xmm_xmmm128,
        M::Vpaddusw => C::Paddusw_xmm_xmmm128,
        M::Vpaddw => C::Paddw_xmm_xmmm128,
        M::Vpalignr => C::Palignr_xmm_xmmm128_imm8,
        M::Vpand => C::Pand_xmm_xmmm128,
        M::Vpandn => C::Pandn_xmm_xmmm128,
        M::Vpavgb => C::Pavgb_xmm_xmmm128,
        M::Vpavgw => C::Pavgw_xmm_xmmm128,
        M::Vpblendw => C::Pblendw_xmm_xmmm128_imm8,
        M::Vpclmulqdq => C::Pclmulqdq_xmm_xmmm128_imm8,
        M::Vpcmpeqb => C::Pcmpeqb_xmm_xmmm128,
        M::Vpcmpeqd => C::Pcmpeqd_xmm_xmmm128,
        M::Vpcmpeqq => C::Pcmpeqq_xmm_xmmm128,
        M::Vpcmpeqw => C::Pcmpeqw_xmm_xmmm128,
        M::Vpcmpgtb => C::Pcmpgtb_xmm_xmmm128,
        M::Vpcmpgtd => C::Pcmpgtd_xmm_xmmm128,
        M::Vpcmpgtq => C::Pcmpgtq_xmm_xmmm128,
        M::Vpcmpgtw => C::Pcmpgtw_xmm_xmmm128,
        M::Vphaddd => C::Phaddd_xmm_xmmm128,
        M::Vphaddsw => C::Phaddsw_xmm_xmmm128,
        M::Vphaddw => C::Phaddw_xmm_xmmm128,
        M::Vphminposuw => C::Phminposuw_xmm_xmmm128,
        M::Vphsubd => C::Phsubd_xmm_xmmm128,
        M::Vphsubsw => C::Phsubsw_xmm_xmmm128,
        M::Vphsubw => C::Phsubw_xmm_xmmm128,
        M::Vpmaddubsw => C::Pmaddubsw_xmm_xmmm128,
        M::Vpmaddwd => C::Pmaddwd_xmm_xmmm128,
        M::Vpmaxsb => C::Pmaxsb_xmm_xmmm128,
        M::Vpmaxsd => C::Pmaxsd_xmm_xmmm128,
        M::Vpmaxsw => C::Pmaxsw_xmm_xmmm128,
        M::Vpmaxub => C::Pmaxub_xmm_xmmm128,
        M::Vpmaxud => C::Pmaxud_xmm_xmmm128,
        M::Vpmaxuw => C::Pmaxuw_xmm_xmmm128,
        M::Vpminsb => C::Pminsb_xmm_xmmm128,
        M::Vpminsd => C::Pminsd_xmm_xmmm128,
        M::Vpminsw => C::Pminsw_xmm_xmmm128,
        M::Vpminub => C::Pminub_xmm_xmmm128,
        M::Vpminud => C::Pminud_xmm_xmmm128,
        M::Vpminuw => C::Pminuw_xmm_xmmm128,
        M::Vpmuldq => C::Pmuldq_xmm_xmmm128,
        M::Vpmulhrsw => C::Pmulhrsw_xmm_xmmm128,
        M::Vpmulhuw => C::Pmulhuw_xmm_xmmm128,
        M::Vpmulhw => C::Pmulhw_xmm_xmmm128,
        M::Vpmulld => C::Pmulld_xmm_xmmm128,
        M::Vpmullw => C::Pmullw_xmm_xmmm128,
        M::Vpmuludq => C::Pmuludq_xmm_xmmm128,
        M::Vpor => C::Por_xmm_xmmm128,
        M::Vpsadbw => C::Psadbw_xmm_xmmm128,
        M::Vpshufb => C::Pshufb_xmm_xmmm128,
        M::Vpshufd => C::Pshufd_xmm_xmmm128_imm8,
        M::Vpshufhw => C::Pshufhw_xmm_xmmm128_imm8,
        M::Vpshuflw => C::Pshuflw_xmm_xmmm128_imm8,
        M::Vpsignb => C::Psignb_xmm_xmmm128,
        M::Vpsignd => C::Psignd_xmm_xmmm128,
        M::Vpsignw => C::Psignw_xmm_xmmm128,
        M::Vpsubb => C::Psubb_xmm_xmmm128,
        M::Vpsubd => C::Psubd_xmm_xmmm128,
        M::Vpsubq => C::Psubq_xmm_xmmm128,
        M::Vpsubsb => C::Psubsb_xmm_xmmm128,
        M::Vpsubsw => C::Psubsw_xmm_xmmm128,
        M::Vpsubusb => C::Psubusb_xmm_xmmm128,
        M::Vpsubusw => C::Psubusw_xmm_xmmm128,
        M::Vpsubw => C::Psubw_xmm_xmmm128,
        M::Vpunpckhbw => C::Punpckhbw_xmm_xmmm128,
        M::Vpunpckhdq => C::Punpckhdq_xmm_xmmm128,
        M::Vpunpckhqdq => C::Punpckhqdq_xmm_xmmm128,
        M::Vpunpckhwd => C::Punpckhwd_xmm_xmmm128,
        M::Vpunpcklbw => C::Punpcklbw_xmm_xmmm128,
        M::Vpunpckldq => C::Punpckldq_xmm_xmmm128,
        M::Vpunpcklqdq => C::Punpcklqdq_xmm_xmmm128,
        M::Vpunpcklwd => C::Punpcklwd_xmm_xmmm128,
        M::Vpxor => C::Pxor_xmm_xmmm128,
        M::Vrcpps => C::Rcpps_xmm_xmmm128,
        M::Vrcpss => C::Rcpss_xmm_xmmm32,
        M::Vroundpd => C::Roundpd_xmm_xmmm128_imm8,
        M::Vroundps => C::Roundps_xmm_xmmm128_imm8,
        M::Vroundsd => C::Roundsd_xmm_xmmm64_imm8,
        M::Vroundss => C::Roundss_xmm_xmmm32_imm8,
        M::Vrsqrtps => C::Rsqrtps_xmm_xmmm128,
        M::Vrsqrtss => C::Rsqrtss_xmm_xmmm32,
        M::Vshufpd => C::Shufpd_xmm_xmmm128_imm8,
        M::Vshufps => C::Shufps_xmm_xmmm128_imm8,
        M::Vsqrtpd => C::Sqrtpd_xmm_xmmm128,
        M::Vsqrtps => C::Sqrtps_xmm_xmmm128,
        M::Vsqrtsd => C::Sqrtsd_xmm_xmmm64,
        M::Vsqrtss => C::Sqrtss_xmm_xmmm32,
        M::Vsubpd => C::Subpd_xmm_xmmm128,
        M::Vsubps => C::Subps_xmm_xmmm128,
        M::Vsubsd => C::Subsd_xmm_xmmm64,
        M::Vsubss => C::Subss_xmm_xmmm32,
        M::Vunpckhpd => C::Unpckhpd_xmm_xmmm128,
        M::Vunpckhps => C::Unpckhps_xmm_xmmm128,
        M::Vunpcklpd => C::Unpcklpd_xmm_xmmm128,
        M::Vunpcklps => C::Unpcklps_xmm_xmmm128,
        M::Vxorpd => C::Xorpd_xmm_xmmm128,
        M::Vxorps => C::Xorps_xmm_xmmm128,
        _ => return None,
    })
}

/// Twins that read less than they write, and the bytes read for each half.
fn widening(m: M) -> Option<(C, u32)> {
    Some(match m {
        M::Vcvtps2pd => (C::Cvtps2pd_xmm_xmmm64, 8),
        M::Vcvtdq2pd => (C::Cvtdq2pd_xmm_xmmm64, 8),
        M::Vpmovsxbw => (C::Pmovsxbw_xmm_xmmm64, 8),
        M::Vpmovsxbd => (C::Pmovsxbd_xmm_xmmm32, 4),
        M::Vpmovsxbq => (C::Pmovsxbq_xmm_xmmm16, 2),
        M::Vpmovsxwd => (C::Pmovsxwd_xmm_xmmm64, 8),
        M::Vpmovsxwq => (C::Pmovsxwq_xmm_xmmm32, 4),
        M::Vpmovsxdq => (C::Pmovsxdq_xmm_xmmm64, 8),
        M::Vpmovzxbw => (C::Pmovzxbw_xmm_xmmm64, 8),
        M::Vpmovzxbd => (C::Pmovzxbd_xmm_xmmm32, 4),
        M::Vpmovzxbq => (C::Pmovzxbq_xmm_xmmm16, 2),
        M::Vpmovzxwd => (C::Pmovzxwd_xmm_xmmm64, 8),
        M::Vpmovzxwq => (C::Pmovzxwq_xmm_xmmm32, 4),
        M::Vpmovzxdq => (C::Pmovzxdq_xmm_xmmm64, 8),
        _ => return None,
    })
}

/// Twins that write half of what they read.
fn narrowing(m: M) -> Option<C> {
    Some(match m {
        M::Vcvtpd2ps => C::Cvtpd2ps_xmm_xmmm128,
        M::Vcvtpd2dq => C::Cvtpd2dq_xmm_xmmm128,
        M::Vcvttpd2dq => C::Cvttpd2dq_xmm_xmmm128,
        _ => return None,
    })
}

/// Shifts of all lanes by the same count: twins by a vector, and by an immediate.
fn shift(m: M) -> Option<(Option<C>, C)> {
    Some(match m {
        M::Vpslldq => (None, C::Pslldq_xmm_imm8),
        M::Vpsrldq => (None, C::Psrldq_xmm_imm8),
        M::Vpsllw => (Some(C::Psllw_xmm_xmmm128), C::Psllw_xmm_imm8),
        M::Vpslld => (Some(C::Pslld_xmm_xmmm128), C::Pslld_xmm_imm8),
        M::Vpsllq => (Some(C::Psllq_xmm_xmmm128), C::Psllq_xmm_imm8),
        M::Vpsrlw => (Some(C::Psrlw_xmm_xmmm128), C::Psrlw_xmm_imm8),
        M::Vpsrld => (Some(C::Psrld_xmm_xmmm128), C::Psrld_xmm_imm8),
        M::Vpsrlq => (Some(C::Psrlq_xmm_xmmm128), C::Psrlq_xmm_imm8),
        M::Vpsraw => (Some(C::Psraw_xmm_xmmm128), C::Psraw_xmm_imm8),
        M::Vpsrad => (Some(C::Psrad_xmm_xmmm128), C::Psrad_xmm_imm8),
        _ => return None,
    })
}

/// Twins whose result is a general register, the flags or memory.
fn general(i: &Instruction) -> Option<C> {
    let long = i.op0_kind() == OpKind::Register && i.op0_register().is_gpr64();
    let by_size = |double, quad| if long { quad } else { double };
    Some(match i.mnemonic() {
        M::Vcvtss2si => by_size(C::Cvtss2si_r32_xmmm32, C::Cvtss2si_r64_xmmm32),
        M::Vcvttss2si => by_size(C::Cvttss2si_r32_xmmm32, C::Cvttss2si_r64_xmmm32),
        M::Vcvtsd2si => by_size(C::Cvtsd2si_r32_xmmm64, C::Cvtsd2si_r64_xmmm64),
        M::Vcvttsd2si => by_size(C::Cvttsd2si_r32_xmmm64, C::Cvttsd2si_r64_xmmm64),
        M::Vcomiss => C::Comiss_xmm_xmmm32,
        M::Vcomisd => C::Comisd_xmm_xmmm64,
        M::Vucomiss => C::Ucomiss_xmm_xmmm32,
        M::Vucomisd => C::Ucomisd_xmm_xmmm64,
        M::Vpextrb => C::Pextrb_r32m8_xmm_imm8,
        M::Vpextrw => C::Pextrw_r32m16_xmm_imm8,
        M::Vpextrd => C::Pextrd_rm32_xmm_imm8,
        M::Vpextrq => C::Pextrq_rm64_xmm_imm8,
        M::Vextractps => C::Extractps_rm32_xmm_imm8,
        M::Vmaskmovdqu => C::Maskmovdqu_rDI_xmm_xmm,
        _ => return None,
    })
}

/// Twins whose source is a general register or a number in memory.
fn inserting(i: &Instruction) -> Option<C> {
    let long = match i.op2_kind() {
        OpKind::Register => i.op2_register().is_gpr64(),
        _ => i.memory_size().size() == 8,
    };
    let by_size = |double, quad| if long { quad } else { double };
    Some(match i.mnemonic() {
        M::Vcvtsi2ss => by_size(C::Cvtsi2ss_xmm_rm32, C::Cvtsi2ss_xmm_rm64),
        M::Vcvtsi2sd => by_size(C::Cvtsi2sd_xmm_rm32, C::Cvtsi2sd_xmm_rm64),
        M::Vpinsrb => C::Pinsrb_xmm_r32m8_imm8,
        M::Vpinsrw => C::Pinsrw_xmm_r32m16_imm8,
        M::Vpinsrd => C::Pinsrd_xmm_rm32_imm8,
        M::Vpinsrq => C::Pinsrq_xmm_rm64_imm8,
        _ => return None,
    })
}

/// The immediate, which is the last operand.
fn immediate(i: &Instruction) -> Option<u8> {
    let last = i.op_count() - 1;
    (i.op_kind(last) == OpKind::Immediate8).then(|| i.immediate8())
}

impl Core {
    /// Runs the twin `code` on two halves.
    pub(in crate::exec) fn twin(
        &mut self,
        code: C,
        to: u128,
        from: u128,
        imm: Option<u8>,
    ) -> R<u128> {
        let mut i = Instruction::default();
        i.set_code(code);
        i.set_op0_register(TO);
        let last = i.op_count() - 1;
        if last > 0 && !(last == 1 && imm.is_some()) {
            i.set_op1_register(FROM);
        }
        if let Some(imm) = imm.filter(|_| last > 0) {
            i.set_op_kind(last, OpKind::Immediate8);
            i.set_immediate8(imm);
        }
        self.fpu.xmm[SCRATCH] = to;
        self.fpu.xmm[SCRATCH + 1] = from;
        let Some(exec) = vector::select(&i) else {
            return Err(self.missing(code));
        };
        exec(self, &i)?;
        Ok(self.fpu.xmm[SCRATCH])
    }

    /// The same for each half that counts. All raise their exceptions before one is a fault.
    fn twins(&mut self, code: C, i: &Instruction, to: Halves, from: Halves) -> R<Halves> {
        let imm = immediate(i);
        let mut result = [0; 2];
        let mut stop = None;
        for n in 0..halves(i) {
            // The upper half has bits of its own for offsets.
            let imm = match i.mnemonic() {
                M::Vmpsadbw if n == 1 => imm.map(|imm| imm >> 3),
                M::Vblendpd | M::Vshufpd if n == 1 => imm.map(|imm| imm >> 2),
                M::Vblendps if n == 1 => imm.map(|imm| imm >> 4),
                // In memory there is one number to choose from.
                M::Vinsertps if i.op2_kind() == OpKind::Memory => imm.map(|imm| imm & 0x3f),
                _ => imm,
            };
            match self.twin(code, to[n], from[n], imm) {
                Ok(half) => result[n] = half,
                Err(e) => stop = Some(e),
            }
        }
        stop.map_or(Ok(result), Err)
    }
}

fn each(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let Some(code) = packed(i.mnemonic()) else {
        return Err(c.ud());
    };
    let last = i.op_count() - 1 - u32::from(immediate(i).is_some());
    let from = c.source(i, last)?;
    let to = match last {
        2 => c.source(i, 1)?,
        _ => [0; 2],
    };
    let result = c.twins(code, i, to, from)?;
    c.set_vector(i.op0_register(), result);
    Ok(())
}

fn widen(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let Some((code, bytes)) = widening(i.mnemonic()) else {
        return Err(c.ud());
    };
    let from = c.source(i, 1)?[0];
    let result = c.twins(code, i, [0; 2], [from, from >> (bytes * 8)])?;
    c.set_vector(i.op0_register(), result);
    Ok(())
}

fn narrow(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let Some(code) = narrowing(i.mnemonic()) else {
        return Err(c.ud());
    };
    let from = c.source(i, 1)?;
    let [low, high] = c.twins(code, i, [0; 2], from)?;
    c.set_vector(i.op0_register(), [low | high << 64, 0]);
    Ok(())
}

fn shifts(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let code = shift(i.mnemonic());
    let to = c.source(i, 1)?;
    let (code, count) = match (code, immediate(i)) {
        (Some((_, code)), Some(_)) => (code, 0),
        (Some((Some(code), _)), None) => (code, c.source(i, 2)?[0]),
        _ => return Err(c.ud()),
    };
    let result = c.twins(code, i, to, [count; 2])?;
    c.set_vector(i.op0_register(), result);
    Ok(())
}

/// The twin with its operands as they are; a vector in memory needs no alignment, since none has 16 bytes.
fn to_general(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let Some(code) = general(i) else {
        return Err(c.ud());
    };
    let mut twin = *i;
    twin.set_code(code);
    match vector::select(&twin) {
        Some(exec) => exec(c, &twin),
        None => Err(c.missing(code)),
    }
}

fn texts(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let Some(code) = text(i.mnemonic()) else {
        return Err(c.ud());
    };
    let (a, b) = (c.vector(i.op0_register())[0], c.source(i, 1)?[0]);
    c.twin(code, a, b, immediate(i))?;
    if matches!(
        i.mnemonic(),
        M::Vpcmpestrm | M::Vpcmpestrm64 | M::Vpcmpistrm
    ) {
        c.fpu.high[0] = 0;
    }
    Ok(())
}

fn insert(c: &mut Core, i: &Instruction) -> R<()> {
    c.avx()?;
    let Some(code) = inserting(i) else {
        return Err(c.ud());
    };
    let mut twin = *i;
    twin.set_code(code);
    twin.set_op0_register(TO);
    twin.set_op1_kind(i.op2_kind());
    if i.op2_kind() == OpKind::Register {
        twin.set_op1_register(i.op2_register());
    }
    if immediate(i).is_some() {
        twin.set_op2_kind(OpKind::Immediate8);
    }
    c.fpu.xmm[SCRATCH] = c.vector(i.op1_register())[0];
    let Some(exec) = vector::select(&twin) else {
        return Err(c.missing(code));
    };
    exec(c, &twin)?;
    let result = c.fpu.xmm[SCRATCH];
    c.set_vector(i.op0_register(), [result, 0]);
    Ok(())
}
