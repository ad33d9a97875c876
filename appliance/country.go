package appliance

import (
	"fmt"
	"strings"
)

// countries are the codes of ISO 3166-1.
const countries = "AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ CA CC CD " +
	"CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR GA GB GD GE GF GG GH GI GL " +
	"GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC " +
	"LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM " +
	"PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF " +
	"TG TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW"

// misnamed are codes that people write, and what they mean.
var misnamed = map[string]string{"UK": "GB", "EN": "GB", "ENGLAND": "GB", "USA": "US", "GER": "DE", "DEU": "DE", "GERMANY": "DE", "DEUTSCHLAND": "DE",
	"FRA": "FR", "FRANCE": "FR", "ESP": "ES", "SPAIN": "ES", "ITALY": "IT", "ITA": "IT", "AUS": "AU", "AUSTRALIA": "AU", "AUT": "AT", "AUSTRIA": "AT",
	"SUI": "CH", "CHE": "CH", "SWITZERLAND": "CH", "SWE": "SE", "SWEDEN": "SE", "NLD": "NL", "NETHERLANDS": "NL", "CAN": "CA", "CANADA": "CA",
	"JAPAN": "JP", "JPN": "JP", "POLAND": "PL", "POL": "PL", "INDIA": "IN", "IND": "IN", "CHINA": "CN", "CHN": "CN", "BRAZIL": "BR", "BRA": "BR"}

// checkCountry takes a code in capital letters.
func checkCountry(code string) error {
	if len(code) == 2 && !strings.Contains(code, " ") && strings.Contains(" "+countries+" ", " "+code+" ") {
		return nil
	}
	if want, ok := misnamed[code]; ok {
		return fmt.Errorf("%q is no country code; did you mean %s?", code, want)
	}
	return fmt.Errorf("%q is no country code; write the two letters of ISO 3166-1, such as DE, GB or US", curtail(code))
}
