package operator

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/natlog"
)

// An abuse report names a port of any egress IP. Where no node has blocks of the IP, the gateway translates to whatever
// port the pod has.
func TestThePortOfAnIPWithoutBlocksWasItsGateways(t *testing.T) {
	now := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	ago := func(hours float64) time.Time { return now.Add(-time.Duration(hours * float64(time.Hour))) }
	block := func(node string, since, until float64) egress.BlockTenure {
		b := egress.BlockTenure{First: 2048, Size: 64, Node: node, Since: ago(since)}
		if until > 0 {
			b.Until = ago(until)
		}
		return b
	}
	owners := []egress.Tenure{{Node: "gw-1", Since: ago(9)}, {Node: "gw-2", Since: ago(5)}}
	static := remembered{egress: "mail,web", since: ago(9), owners: owners}
	shared := remembered{egress: "web", since: ago(9), owners: owners, tenures: []egress.BlockTenure{block("n1", 8, 0)}}
	once := remembered{egress: "web", since: ago(9), owners: owners, tenures: []egress.BlockTenure{block("n1", 8, 7), block("n2", 4, 3)}}
	const slack = 0.02 // more than a minute, and less than two
	// By a clock that is ahead.
	ahead := remembered{egress: "web", since: ago(9), owners: []egress.Tenure{{Node: "gw-1", Since: ago(9)}, {Node: "gw-2", Since: ago(-slack)}},
		tenures: []egress.BlockTenure{block("n1", 8, 0), {First: 4096, Size: 64, Node: "n2", Since: ago(-slack)}}}
	for name, tt := range map[string]struct {
		of      remembered
		port    uint16
		ago     float64 // 0: now
		want    string
		missing string
	}{
		"a static IP":                               {static, 41012, 1, "gw-2 1-65535", ""},
		"a static IP, now":                          {static, 41012, 0, "gw-2 1-65535", ""},
		"a static IP that another node had":         {static, 41012, 6, "gw-1 1-65535", ""},
		"a static IP, a port that the pod chose":    {static, 22, 1, "gw-2 1-65535", ""},
		"a static IP, before anybody had it":        {static, 41012, 10, "", "the gateway then is not known"},
		"a block that a node has just got":          {ahead, 4100, 0, "n2 4096-4159", ""},
		"a block that it got then":                  {ahead, 4100, slack / 2, "n2 4096-4159", ""},
		"an IP that a node has just taken over":     {ahead, 1500, 0, "gw-2 1024-2047", ""},
		"a block":                                   {shared, 2050, 1, "n1 2048-2111", ""},
		"a block, now":                              {shared, 2050, 0, "n1 2048-2111", ""},
		"beside all blocks":                         {shared, 41012, 1, "", ""},
		"below all blocks":                          {shared, 1024, 1, "gw-2 1024-2047", ""},
		"below what a gateway translates to":        {shared, 1023, 1, "", ""},
		"before there were blocks":                  {shared, 41012, 8.5, "gw-1 1-65535", ""},
		"as they were about to come":                {shared, 41012, 8 - slack, "gw-1 1-65535", ""},
		"when there was a block":                    {once, 41012, 7.5, "", ""},
		"as the last block went":                    {once, 41012, 3 + slack, "gw-2 1-65535", ""},
		"of a block that rested, and of no other":   {once, 2050, 3 - slack, "gw-2 1-65535, n2 2048-2111 rests", ""},
		"when there were no blocks any more":        {once, 2050, 2, "gw-2 1-65535", ""},
		"between two times when there were some":    {once, 2050, 6, "gw-1 1-65535", ""},
		"blocks were turned off, and it is now":     {once, 2050, 0, "gw-2 1-65535", ""},
		"a port of blocks, before it was allocated": {once, 2050, 9.5, "", "etcd does not remember"},
	} {
		q := natlog.Question{IP: netip.MustParseAddr("203.0.113.5"), Port: tt.port, From: ago(tt.ago), To: ago(tt.ago).Add(time.Second)}
		cfg := WhoConfig{Question: q, Now: tt.ago == 0}
		holders, missing := tt.of.holders(cfg)
		var got []string
		for _, h := range holders {
			text := fmt.Sprintf("%s %d-%d", h.Node, h.First, h.Last)
			if h.Resting {
				text += " rests"
			}
			if got = append(got, text); h.Gateway != strings.HasPrefix(h.Node, "gw-") {
				t.Errorf("%s: %+v", name, h)
			}
		}
		if text := strings.Join(got, ", "); text != tt.want {
			t.Errorf("%s: of %q, want %q", name, text, tt.want)
		}
		if text := strings.Join(missing, "; "); !strings.Contains(text, tt.missing) || tt.missing == "" && text != "" {
			t.Errorf("%s: missing is %q, want %q", name, text, tt.missing)
		}
	}
}
