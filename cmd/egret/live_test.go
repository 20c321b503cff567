package main

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/egret-project/egret/operator"
)

func TestWhatCannotBeFollowedIsRefused(t *testing.T) {
	to4, to6 := netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("2001:db8::9")
	for name, tt := range map[string]struct {
		f    liveFlags
		to   netip.Addr
		want string // of the error; "": there is none
		live *operator.Live
	}{
		"nothing":                   {liveFlags{protocol: "tcp"}, netip.Addr{}, "", nil},
		"TCP":                       {liveFlags{true, "tcp", 443}, to4, "", &operator.Live{Protocol: 6, Port: 443, Page: "/live"}},
		"UDP to any port":           {liveFlags{true, "udp", 0}, to6, "", &operator.Live{Protocol: 17, Page: "/live"}},
		"ICMP":                      {liveFlags{true, "icmp", 0}, to4, "", &operator.Live{Protocol: 1, Page: "/live"}},
		"ICMP of IPv6":              {liveFlags{true, "icmp", 0}, to6, "", &operator.Live{Protocol: 58, Page: "/live"}},
		"without --to":              {liveFlags{true, "tcp", 443}, netip.Addr{}, "--live: want --to", nil},
		"a port of ICMP":            {liveFlags{true, "icmp", 443}, to4, "--port 443", nil},
		"a port that there is not":  {liveFlags{true, "tcp", 65536}, to4, "--port 65536", nil},
		"another protocol":          {liveFlags{true, "sctp", 443}, to4, `--protocol "sctp": want one of tcp, udp, icmp`, nil},
		"--port without --live":     {liveFlags{false, "tcp", 443}, to4, "want it, too", nil},
		"--protocol without --live": {liveFlags{false, "udp", 0}, to4, "want it, too", nil},
	} {
		q := operator.Question{To: tt.to}
		err := tt.f.question(&q)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
		if (q.Live == nil) != (tt.live == nil) || q.Live != nil && *q.Live != *tt.live {
			t.Errorf("%s: %+v", name, q.Live)
		}
	}
}
