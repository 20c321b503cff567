package nft

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/need"
)

// A flowtable of others, as kindnet's fast path, takes over connections that have had an answer, and their packets pass
// none of the tables: they go on as they did, whatever becomes of the permit. So egret check names it. What is kept out
// of it is as without it.
func TestAFlowtableOfOthersTakesConnectionsPastThePermit(t *testing.T) {
	need.Flowtable(t)
	for _, tt := range []struct {
		name, unless string
		passes       bool
	}{
		{"all connections", "", true},
		{"all but Egret's", "ct mark and 0xffff0000 != 0x0e9e0000 ", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tables := open(t)
			f := bothSides[0]
			ext, p := outside(t), pod(t)
			f.addEgressIP(t)
			ext.serve(f.server)
			reach(t, tables, parseState(t, f.base()+fmt.Sprintf("pod %s 5\nnexthop 5 0x3fff\nhosted 5 %s 0x3fff\n", f.pod, f.egress)))
			if err := tables.Permit([]Permit{{netip.MustParseAddr(f.egress), true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			nft(t, `table inet fast {
				flowtable path { hook ingress priority 0; devices = { cni0, eth0 }; }
				chain forward { type filter hook forward priority 0; `+tt.unless+`meta l4proto udp flow add @path; }
			}`)
			var c net.Conn
			p.do(func() (err error) { c, err = net.Dial("udp", net.JoinHostPort(f.server, "7000")); return err })
			defer c.Close()
			seen := func() string {
				b := make([]byte, 100)
				for range 5 {
					c.Write([]byte("?")) // what is lost shows as no answer
					c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
					if n, err := c.Read(b); err == nil {
						return string(b[:n])
					}
				}
				return ""
			}
			for range 5 {
				if got := seen(); got != f.egress {
					t.Fatalf("seen as %q, want %s", got, f.egress)
				}
			}
			if err := tables.Revoke(f.egressIP()); err != nil {
				t.Fatal(err)
			}
			if got := seen(); (got != "") != tt.passes {
				t.Errorf("without a permit the connection is seen as %q", got)
			}
		})
	}
}
