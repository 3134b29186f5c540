//! Finds the name of a published tokenizer's splitting as llama.cpp's converter does: by the SHA-256 of the ids of a
//! fixed text.

use sha2::{Digest, Sha256};
use std::fmt::Write as _;

/// The text whose ids identify a tokenizer.
pub(super) const TEXT: &str = "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u{200d}🌫\u{fe0f} (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL";

/// Names with the first 64 bits of their hashes.
const HASHES: &[(&str, &[u64])] = &[
    ("a.x-4.0", &[0xb0a6_b1c0_bd59_98eb]),
    ("afmoe", &[0x49fc_0303_c9e0_d2c2]),
    ("bailingmoe", &[0x96a5_f08b_e625_9352]),
    ("bailingmoe2", &[0x9b1b_e57e_70d2_0d95]),
    ("bloom", &[0x3c30_d3ad_1d6b_6420]),
    ("chameleon", &[0x6082_4e3c_0d94_01f8]),
    ("chatglm-bpe", &[0xb6e8_e151_8dc4_305b, 0x81d7_2c73_48a9_f0eb]),
    ("codeshell", &[0x7b3e_7548_e430_8f52]),
    ("cohere2moe", &[0x52df_12b4_c8d4_176e]),
    ("command-r", &[0x9c22_27e4_dd92_2002]),
    ("dbrx", &[0xa859_4e3e_dff7_c29c]),
    ("deepseek-coder", &[0x3477_15f5_4460_4f91]),
    ("deepseek-llm", &[0x049e_cf76_2987_1e30]),
    ("deepseek-r1-qwen", &[0xb3f4_99bb_4255_f8ca]),
    ("deepseek-v3", &[0x8770_81d1_9cf6_996e]),
    ("exaone", &[0x4e2b_24cc_4770_243d]),
    ("exaone-moe", &[0x6c81_ce32_9e08_0288]),
    ("exaone4", &[0x2085_e163_8f6c_377a]),
    ("f2llmv2", &[0x862f_8277_21df_9560]),
    ("falcon", &[0x8aee_e386_0c56_296a]),
    ("falcon-h1", &[0xa6b5_7017_d60e_6edb, 0x6047_6e12_4377_6c4f, 0x3eda_48b4_c4dc_7de7, 0x48f8_e02c_0359_c0bb]),
    ("falcon3", &[0x9d03_2fcb_d550_1f4a]),
    ("gigachat", &[0xad85_1be1_dba6_41f2]),
    ("glm4", &[0xa133_6059_768a_55c9, 0x9ca2_dd61_8e8a_faf0, 0xcdf5_f353_2578_0597]),
    ("gpt-2", &[0x0fe1_cf6e_da06_2318, 0x3ce8_3efd_a565_9b07]),
    ("gpt-4o", &[0xccc2_ef01_3c10_4be7]),
    ("gpt3-finnish", &[0xbc01_ce58_980e_1db4]),
    ("granite-docling", &[0x53e3_2597_6a6e_1423]),
    ("granite-embed-multi-97m", &[0xf241_0721_4567_5bf8]),
    ("grok-2", &[0x66b8_d4e1_9ab1_6c3b]),
    ("hunyuan", &[0x7e57_df22_b1fe_23a7]),
    ("hunyuan-dense", &[0xbba3_b336_6b64_6dbd]),
    ("hy_v4", &[0xe6dd_f9c6_6867_91c1]),
    ("jais", &[0xb538_02fb_28e2_6d64]),
    ("jais-2", &[0xbc51_08ee_1eb6_a3d6]),
    ("jina-v2-de", &[0xb3d1_dd86_1f1d_4c5c, 0x2794_9a24_93fc_4a9f]),
    ("jina-v2-es", &[0x171a_eeed_d6fb_548d]),
    ("jina-v5-nano", &[0xa023_e9fd_c5a1_1f03]),
    ("joyai-llm", &[0xb4b8_ca1f_9769_494f]),
    ("kanana2", &[0xe4d5_4df1_ebc1_f2b9]),
    ("kimi-k2", &[0x8121_2dc7_cdb7_e0c1]),
    ("kormo", &[0x4a2e_2aba_e11c_a2b8]),
    ("laguna", &[0x972d_a7b5_9cec_44d1]),
    ("lfm2", &[0x9e45_4714_343b_69b9, 0x169b_f029_6a13_c4d9]),
    ("llama-bpe", &[0x0ef9_807a_4087_ebef]),
    ("llama4", &[0xd353_350c_764d_8c3b]),
    ("megrez", &[0xd4c8_f286_ea6b_520b]),
    ("mellum", &[0xa1e1_63ec_ab2e_718a]),
    ("mellum2", &[0x9dcf_830e_e999_0cdb]),
    ("midm-2.0", &[0xf679_1d19_6f87_ce6b]),
    ("minerva-7b", &[0x1431_a23e_583c_9743]),
    ("minicpm5", &[0x36f3_066e_97b7_f399]),
    ("minimax-m2", &[0xf4f3_7b6c_8eb9_ea29]),
    ("modern-bert", &[0xa0b6_4b43_85f1_2366]),
    ("mpt", &[0xb6dc_8df9_98e1_cfbd]),
    ("olmo", &[0xb6dc_8df9_98e1_cfbd]),
    ("phi-2", &[0xfcac_e8b9_cac3_8ce8]),
    ("pixtral", &[0x0e94_33cb_bb16_1f89]),
    ("poro-chat", &[0xc7ea_5862_a53e_4272]),
    ("qwen2", &[0xd454_0891_389e_a895, 0xe636_dc30_a262_dcc0]),
    ("qwen35", &[0x1444_df51_289c_fa80, 0xd30d_75d9_059f_1aa2]),
    ("refact", &[0x6221_ad28_52e8_5ce9]),
    ("seed-coder", &[0xd5f1_dd6f_980f_ec56]),
    ("smaug-bpe", &[0xc136_ed14_d01c_2745]),
    ("smollm", &[0x8550_5942_9035_d75a]),
    ("solar-open", &[0x1638_9f0a_1f51_ee53]),
    ("spark2_5", &[0x0a76_6d03_4107_bc73]),
    ("stablelm2", &[0x32d8_5c31_273f_8019]),
    ("starcoder", &[0x35d9_1631_860c_815f]),
    ("superbpe", &[0x7dec_8608_6fcc_38b6]),
    ("talkie", &[0xf728_162c_1315_c26e]),
    ("tekken", &[0x63b9_7e42_5335_2e6f]),
    ("tiny_aya", &[0xd772_b220_ace2_baec]),
    ("trillion", &[0x1994_ffd0_1900_cfb3]),
    ("ufakzeka", &[0x6536_6022_2fb7_04f6]),
    ("viking", &[0x7fc5_05bd_3104_ca10]),
    ("youtu", &[0x9d70_134b_369a_70e5]),
];

/// The name of the tokenizer that has these ids for [`TEXT`], if it is a published one.
pub(super) fn published_name(ids: &[u32]) -> Option<&'static str> {
    let mut list = String::from("[");
    for (index, id) in ids.iter().enumerate() {
        let separator = if index == 0 { "" } else { ", " };
        // writing to a string does not fail
        let _ = write!(list, "{separator}{id}");
    }
    list.push(']');
    let digest = Sha256::digest(list.as_bytes());
    let hash = digest.iter().take(8).fold(0_u64, |hash, byte| hash << 8 | u64::from(*byte));
    HASHES.iter().find(|(_, hashes)| hashes.contains(&hash)).map(|(name, _)| *name)
}

#[cfg(test)]
mod tests {
    use super::published_name;

    /// The ids of GPT-2.
    const GPT2: &[u32] = &[
        198, 220, 628, 220, 628, 198, 220, 197, 220, 197, 197, 220, 197, 198, 220, 220, 198, 220, 220, 220, 198, 220,
        220, 220, 220, 198, 220, 220, 220, 220, 220, 198, 8582, 248, 222, 357, 11265, 8, 30325, 114, 447, 235, 8582,
        234, 104, 37929, 357, 48101, 795, 13210, 271, 1673, 36686, 515, 8, 14519, 227, 12520, 99, 247, 8582, 99, 247,
        513, 4747, 23460, 513, 20370, 23460, 2091, 23460, 20370, 23460, 24840, 23460, 2091, 20370, 513, 13, 18, 513,
        492, 18, 513, 986, 18, 28053, 252, 222, 157, 252, 114, 157, 252, 241, 157, 253, 233, 157, 252, 237, 157, 253,
        224, 157, 252, 244, 157, 252, 115, 157, 252, 253, 157, 253, 223, 157, 252, 253, 157, 252, 95, 157, 252, 114,
        157, 252, 227, 47249, 223, 5633, 22755, 239, 46349, 111, 28839, 101, 18040, 32432, 98, 43291, 1485, 1415,
        24309, 25465, 171, 121, 252, 40103, 1421, 18604, 12466, 121, 16843, 141, 231, 15166, 12466, 121, 16142, 12466,
        239, 141, 232, 30143, 140, 111, 16142, 21169, 21727, 31583, 18849, 705, 39115, 6, 33153, 15506, 63, 15931,
        15931, 16317, 13896, 3228, 9805, 3548, 314, 1053, 587, 705, 44040, 339, 338, 612, 11, 705, 2200, 345, 1654, 30,
        705, 44, 407, 1654, 314, 1183, 787, 340, 11, 705, 35, 345, 588, 617, 8887, 30, 775, 6, 26979, 257, 6, 75, 43,
    ];

    #[test]
    fn published_tokenizers_are_known_by_their_ids() {
        assert_eq!(published_name(GPT2), Some("gpt-2"));
        assert_eq!(published_name(&GPT2[1..]), None);
    }
}
