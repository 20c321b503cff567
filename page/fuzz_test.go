package page

import (
	"fmt"
	"strings"
	"testing"
)

// Whoever looks at the page may ask for anything: he gets what has one form, and not too much of it.
func FuzzIPs(f *testing.F) {
	for _, text := range []string{"", "10.10.0.11", "10.10.0.11,fd00::b1", "::ffff:10.10.0.11", "fe80::1%eth0", ",", strings.Repeat("::,", maxTraffic) + "::"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		ips, err := parseIPs(text)
		if err != nil {
			return
		}
		if len(ips) == 0 || len(ips) > maxTraffic {
			t.Errorf("%q: %d addresses", text, len(ips))
		}
		var again []string
		for _, ip := range ips {
			if !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" {
				t.Errorf("%q has %v", text, ip)
			}
			again = append(again, ip.String())
		}
		if same, err := parseIPs(strings.Join(again, ",")); err != nil || fmt.Sprint(same) != fmt.Sprint(ips) {
			t.Errorf("%q is %v, and then %v, %v", text, ips, same, err)
		}
	})
}
