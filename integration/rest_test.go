package integration

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"
)

// work is what the members of etcd have done together, and how often each node's ruleset of nftables was changed.
type work struct {
	at                      time.Time
	reads, writes, renewals float64
	generations             map[string]uint32
}

func doneByNow(t *testing.T) work {
	t.Helper()
	w := work{at: time.Now(), generations: map[string]uint32{}}
	client := http.Client{Timeout: 10 * time.Second}
	for _, member := range cluster.EtcdEndpoints() {
		r, err := client.Get("http://" + member + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		parser := expfmt.NewTextParser(model.LegacyValidation)
		families, err := parser.TextToMetricFamilies(r.Body)
		_ = r.Body.Close() // it was read
		if err != nil {
			t.Fatalf("metrics of %s: %v", member, err)
		}
		w.reads += handled(families, "Range", "Txn")
		// each member applies all
		w.writes = max(w.writes, families["etcd_server_proposals_applied_total"].GetMetric()[0].GetGauge().GetValue())
		w.renewals += families["etcd_debugging_lease_renewed_total"].GetMetric()[0].GetCounter().GetValue()
	}
	for _, node := range nodes() {
		if err := cluster.In("node", node, func() (err error) { w.generations[node], err = rulesetGeneration(); return err }); err != nil {
			t.Fatalf("ruleset of %s: %v", node, err)
		}
	}
	return w
}

// handled is how many requests of some kinds a member has answered.
func handled(families map[string]*dto.MetricFamily, methods ...string) (sum float64) {
	for _, m := range families["grpc_server_handled_total"].GetMetric() {
		for _, l := range m.GetLabel() {
			for _, method := range methods {
				if l.GetName() == "grpc_method" && l.GetValue() == method {
					sum += m.GetCounter().GetValue()
				}
			}
		}
	}
	return sum
}

// rulesetGeneration returns how often anybody has changed the ruleset of the namespace of the calling thread.
func rulesetGeneration() (uint32, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	m, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, 0, 0, 0},
	})
	if err != nil {
		return 0, err
	}
	for _, one := range m {
		attributes, err := netlink.UnmarshalAttributes(one.Data[4:])
		if err != nil {
			return 0, err
		}
		for _, a := range attributes {
			if a.Type == unix.NFTA_GEN_ID {
				return binary.BigEndian.Uint32(a.Data), nil
			}
		}
	}
	return 0, fmt.Errorf("the kernel does not say its generation: %d answers", len(m))
}

// What a cluster at rest asks of etcd and writes to the kernels is what thousands of nodes multiply. A busy machine
// disturbs the rest, so the quietest of some spans counts: none of them may be too quiet, that is, not renew what it
// has to. And the quietest minute counts: what commits seldom does so in each of them.
func TestAClusterAtRestAsksAndWritesLittle(t *testing.T) {
	n := newNamespace(t)
	_, gateway, _ := n.remote("rest", "10.10.0.54")
	const span = 5 * time.Second
	const minute, mostCommits = 12, 2 // spans, and of each node's ruleset in those
	interval := (leaseTTL / 10).Seconds()
	holders, idle := 1.0, float64(len(nodes())-1)
	// A holder asks every fifth of a permit of 500 ms. crdsync asks a few times a second, too.
	mostReads := holders*10 + 6
	// A holder renews its lease at each interval, others at each third; a renewal that goes to two members counts
	// twice, and crdsync's lease is another one.
	leastRenewals, mostRenewals := 0.5/interval, (holders+idle/3)/interval*1.2+1
	var seen bytes.Buffer
	quiet := false
	all := []work{doneByNow(t)}
	for deadline := time.Now().Add(4 * time.Minute); ; {
		time.Sleep(span) // nothing is waited for: it is what does not happen that counts
		before, after := all[len(all)-1], doneByNow(t)
		all = append(all, after)
		seconds := after.at.Sub(before.at).Seconds()
		reads, writes, renewals := (after.reads-before.reads)/seconds, after.writes-before.writes, (after.renewals-before.renewals)/seconds
		commits := commitsBetween(before, after, 0)
		fmt.Fprintf(&seen, "%s holds an IP: %.1f reads and %.1f renewals of leases a second; in %.1f s %.0f writes, commits %v\n", gateway, reads, renewals, seconds, writes, commits)
		quiet = quiet || reads <= mostReads && renewals >= leastRenewals && renewals <= mostRenewals && writes == 0 && len(commits) == 0
		if len(all) > minute && quiet && len(commitsBetween(all[len(all)-1-minute], after, mostCommits)) == 0 {
			t.Log(seen.String())
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("want %.1f reads a second at most, %.1f to %.1f renewals, no writes, and no commits, once; and in %v %d commits a node at most, once:\n%s",
				mostReads, leastRenewals, mostRenewals, minute*span, mostCommits, seen.String())
		}
	}
}

// commitsBetween returns how often the ruleset of each node was changed, of those where that was more than most times.
func commitsBetween(before, after work, most uint32) map[string]uint32 {
	out := map[string]uint32{}
	for node, g := range after.generations {
		if n := g - before.generations[node]; n > most {
			out[node] = n
		}
	}
	return out
}
