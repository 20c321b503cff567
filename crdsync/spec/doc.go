// Package spec reads the specs of Egress and ExternalIPPool, and says what is wrong with them: by themselves, and
// beside the other pools and the addresses in use. An error says which field, which value, and what would be right.
//
// It is pure, and owns nothing. The webhook refuses what is wrong; crdsync reports the same of objects that came past
// it. What the CRDs' schema refuses is checked all the same, for objects that are older than the schema.
package spec
