package main

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/spf13/pflag"

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
		"nothing":                  {liveFlags{protocol: "tcp"}, netip.Addr{}, "", nil},
		"TCP":                      {liveFlags{true, "tcp", 443}, to4, "", &operator.Live{Protocol: 6, Port: 443, Page: "/live"}},
		"UDP to any port":          {liveFlags{true, "udp", 0}, to6, "", &operator.Live{Protocol: 17, Page: "/live"}},
		"ICMP":                     {liveFlags{true, "icmp", 0}, to4, "", &operator.Live{Protocol: 1, Page: "/live"}},
		"ICMP of IPv6":             {liveFlags{true, "icmp", 0}, to6, "", &operator.Live{Protocol: 58, Page: "/live"}},
		"without --to":             {liveFlags{true, "tcp", 443}, netip.Addr{}, "--live: want --to", nil},
		"a port of ICMP":           {liveFlags{true, "icmp", 443}, to4, "--port 443", nil},
		"a port that there is not": {liveFlags{true, "tcp", 65536}, to4, "--port 65536", nil},
		"another protocol":         {liveFlags{true, "sctp", 443}, to4, `--protocol "sctp": want one of tcp, udp, icmp`, nil},
		"GRE":                      {liveFlags{true, "gre", 0}, to4, `--protocol "gre": want one of tcp, udp, icmp`, nil},
		"no protocol":              {liveFlags{true, "", 0}, to4, "", &operator.Live{Protocol: 6, Page: "/live"}},
		"a port of nothing":        {liveFlags{false, "tcp", 443}, netip.Addr{}, "--port 443: want --to", nil},
		"a port of GRE":            {liveFlags{false, "gre", 443}, to4, "--port 443: want one of TCP, UDP or SCTP", nil},
		"no protocol of IP":        {liveFlags{false, "http", 0}, to4, `--protocol "http": want tcp, udp, sctp`, nil},
		"a number too large":       {liveFlags{false, "256", 0}, to4, `--protocol "256"`, nil},
		"a port below all":         {liveFlags{false, "tcp", -1}, to4, "--port -1", nil},
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

func TestPortAndProtocolAreOfTheQuestion(t *testing.T) {
	to := netip.MustParseAddr("198.51.100.9")
	for name, tt := range map[string]struct {
		args []string
		to   netip.Addr
		want operator.Question
	}{
		"nothing":                   {nil, to, operator.Question{}},
		"a port":                    {[]string{"--port", "443"}, to, operator.Question{Protocol: "tcp", Port: 443}},
		"by the short name":         {[]string{"--proto", "udp", "--port", "53"}, to, operator.Question{Protocol: "udp", Port: 53}},
		"one without ports":         {[]string{"--protocol=gre"}, netip.Addr{}, operator.Question{Protocol: "gre"}},
		"a number":                  {[]string{"--protocol=253"}, to, operator.Question{Protocol: "253"}},
		"SCTP, which has no --live": {[]string{"--protocol=sctp", "--port=2905"}, to, operator.Question{Protocol: "sctp", Port: 2905}},
	} {
		var f liveFlags
		flags := pflag.NewFlagSet("trace", pflag.ContinueOnError)
		f.add(flags)
		q := operator.Question{To: tt.to}
		tt.want.To = tt.to
		if err := errors.Join(flags.Parse(tt.args), f.question(&q)); err != nil || q != tt.want {
			t.Errorf("%s: %+v, %v; want %+v", name, q, err, tt.want)
		}
	}
}
