package bundle

import (
	"strings"
	"testing"
	"unicode"
)

// What stands in records and logs, whoever wrote it: no password that is known and no control character gets into an
// archive.
func FuzzText(f *testing.F) {
	const secret = "hunter22"
	for _, s := range []string{
		"", secret, "\x1b]0;owned\x07", "-----BEGIN PRIVATE KEY-----\nMHcCAQ " + secret, "hunter\xff22", "node-1 at 10.10.0.11/24, fd10::11%eth0 and 02:aa:bb:cc:dd:ee",
		"node:fd10::11::", "::ffff:10.10.0.11", "1.2.3.4.5.6/33", "a-node-1_node-10.", `{"by":"alice@laptop (certificate CN=alice)"} {"a":[`, `{"node-1":{"hunter22":1e9999}}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		control := func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' }
		plain := cleaner{hide: []string{secret}}
		if out := plain.text(s); strings.Contains(out, secret) || strings.ContainsFunc(out, control) {
			t.Errorf("%q is written as %q", s, out)
		}
		redacts := cleaner{redact: secretsRedactor(map[string]string{"node-1": "NODE", "alice@laptop (certificate CN=alice)": person})}
		if out := redacts.text(s); strings.ContainsFunc(out, control) {
			t.Errorf("%q is written as %q with --redact", s, out)
		}
		for _, as := range []form{object, lines} {
			for _, c := range []cleaner{plain, redacts} {
				_, _ = c.data(as, []byte(s)) // no more than an error
			}
		}
	})
}
