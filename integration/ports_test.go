package integration

import (
	"encoding/json"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// A pod opens more connections to one destination than its node's first block has ports, over some seconds, and keeps
// them. All of them open, since the node gets a larger block meanwhile.
func TestABlockGrowsBeforeConnectionsFailForWantOfPorts(t *testing.T) {
	n := newNamespace(t)
	ip, _, pod := n.remote("grows", "10.10.0.58")
	const port, most, perSecond = 7917, 1400, 120
	var l net.Listener
	to := net.JoinHostPort(lab.OutsideIP.String(), fmt.Sprint(port))
	if err := cluster.In("outside", "", func() (err error) { l, err = net.Listen("tcp", to); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
		}
	}()
	late := 0
	err := cluster.In("pod", pod, func() error {
		tick := time.NewTicker(time.Second / perSecond)
		defer tick.Stop()
		for i := range most {
			<-tick.C
			began := time.Now()
			// a pod of the lab has few ports to choose from
			d := net.Dialer{Timeout: 8 * time.Second, LocalAddr: &net.TCPAddr{Port: 10000 + i}}
			c, err := d.Dial("tcp", to)
			if err != nil {
				return fmt.Errorf("connection %d: %w", i+1, err)
			}
			defer c.Close()
			if time.Since(began) > 900*time.Millisecond {
				late++
			}
		}
		return nil
	})
	if err != nil || late > most/100 { // a machine may stand still for a moment
		t.Errorf("of %d connections %d were late; error %v", most, late, err)
	}
	out, err := cluster.Egret(t.Context(), "get", "blocks", ip.String(), "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var blocks []struct {
		Size    int
		Retired bool
	}
	if err := json.Unmarshal(out, &blocks); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if len(blocks) != 2 || max(blocks[0].Size, blocks[1].Size) != 2048 {
		t.Errorf("blocks %+v, want a retired one and one of 2048 ports", blocks)
	}
	t.Logf("%d connections, %d late; blocks %+v", most, late, blocks)
}
