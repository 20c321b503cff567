package integration

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

func TestBandwidthIsLimitedAndChangesWithoutTouchingConnections(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("bandwidth", "10.10.0.31")
	limit := func(spec, shows string) {
		t.Helper()
		kubectl(t, "patch", "egress", "bandwidth", "--type", "merge", "-p", `{"spec":{"bandwidth":`+spec+`}}`)
		eventually(t, 5*time.Second, func() error {
			out, err := cluster.Exec(t.Context(), "node", gateway, "nft", "list", "limits", "table", "inet", "egret")
			if err == nil && (shows == "" && strings.Contains(string(out), "rate") || !strings.Contains(string(out), shows)) {
				err = fmt.Errorf("want %q in:\n%s", shows, out)
			}
			return err
		})
	}
	for _, mbits := range []float64{10, 100, 800} {
		// The kernel gets 31/32 of the bytes.
		limit(fmt.Sprintf(`{"rate":"%.0fM","burst":"1M"}`, mbits), fmt.Sprintf("rate over %.0f bytes/second", math.Ceil(mbits*1e6/8*31/32)))
		for again := 2; ; again-- { // on a busy machine less may come
			got, err := cluster.Throughput(t.Context(), pod, lab.OutsideIP, 10*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("limit %.0f Mbit/s: %.1f", mbits, got/1e6)
			got /= 1e6
			if got < mbits*9/10 && again > 0 {
				continue
			}
			if math.Abs(got-mbits) > mbits/10 {
				t.Errorf("limit %.0f Mbit/s: %.1f arrived, want at most a tenth more or less", mbits, got)
			}
			break
		}
	}
	r := probe(t, pod, 3*time.Second, func() {
		limit(`{"rate":"20M","burst":"1M"}`, "rate over 2421875 bytes/second")
		limit("null", "")
	})
	only(t, r, ip)
	lossless(t, "while the limit was changed and removed", r)
	if got, err := cluster.Throughput(t.Context(), pod, lab.OutsideIP, time.Second); err != nil || got < 1e8 {
		t.Errorf("without a limit: %.1f Mbit/s, %v", got/1e6, err)
	}
}
