package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/crdsync"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
)

// page is the metrics page of a daemon at a time.
type page struct {
	text     []byte
	families map[string]*dto.MetricFamily
}

// fetch asks a daemon of the lab for a page, from where it runs.
func fetch(t *testing.T, kind, name string, port int, path string) (status int, body []byte) {
	t.Helper()
	err := cluster.In(kind, name, func() error {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)) // here: another goroutine would dial elsewhere
		if err != nil {
			return err
		}
		client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}}
		r, err := client.Get("http://127.0.0.1" + path)
		if err != nil {
			return err
		}
		defer r.Body.Close()
		status = r.StatusCode
		body, err = io.ReadAll(r.Body)
		return err
	})
	if err != nil {
		t.Fatalf("%s of %s: %v", path, name, err)
	}
	return status, body
}

func scrape(t *testing.T, kind, name string, port int) page {
	t.Helper()
	status, body := fetch(t, kind, name, port, "/metrics")
	scraped = time.Now()
	if status != http.StatusOK {
		t.Fatalf("%s: %d %s", name, status, body)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(body))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return page{body, families}
}

// scraped is when a page was asked for last.
var scraped time.Time

// anew waits until no daemon serves what it gathered when it was asked last: pages are a second old at most.
func anew() { time.Sleep(time.Until(scraped.Add(1100 * time.Millisecond))) }

// agents returns the pages of the agents now.
func agents(t *testing.T) map[string]page {
	t.Helper()
	anew()
	out := map[string]page{}
	for _, node := range nodes() {
		out[node] = scrape(t, "node", node, egress.StatusPort)
	}
	return out
}

// value returns the value of a metric, of a histogram the count and the sum, with labels as name=value. What is not
// there is 0.
func (p page) value(m monitor.Metric, labels ...string) (value, sum float64) {
	f := p.families[m.Name]
	if f == nil {
		return 0, 0
	}
	for _, one := range f.Metric {
		have := map[string]bool{}
		for _, l := range one.Label {
			have[l.GetName()+"="+l.GetValue()] = true
		}
		if slices.ContainsFunc(labels, func(l string) bool { return !have[l] }) {
			continue
		}
		if h := one.Histogram; h != nil {
			value += float64(h.GetSampleCount())
			sum += h.GetSampleSum()
		}
		value += one.GetCounter().GetValue() + one.GetGauge().GetValue()
	}
	return value, sum
}

// metric returns the one of that name that an agent, or crdsync, has.
func metric(t *testing.T, list []monitor.Metric, name string) monitor.Metric {
	t.Helper()
	i := slices.IndexFunc(list, func(m monitor.Metric) bool { return m.Name == name })
	if i < 0 {
		t.Fatalf("there is no metric %s", name)
	}
	return list[i]
}

func TestMetricsSayWhatPacketsSaid(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("metrics", "10.10.0.50")
	home, label := otherNode(gateway), "egress_ip="+ip.String()
	of := func(name string) monitor.Metric { return metric(t, agent.Metrics(), name) }
	// grown is by how much a metric is more in after, over all nodes.
	grown := func(before, after map[string]page, name string, labels ...string) (more float64) {
		for _, node := range nodes() {
			b, _ := before[node].value(of(name), labels...)
			a, _ := after[node].value(of(name), labels...)
			more += a - b
		}
		return more
	}
	is := func(what string, got, want float64) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}

	// Traffic, by another node's gateway.
	before := agents(t)
	r := probe(t, pod, time.Second, func() {})
	lossless(t, "beside scrapes", r)
	after := agents(t)
	const size = 20 + 8 + 8 // IP, UDP, a number
	arrived := float64(r.Sent - r.Lost)
	if sent := grown(before, after, "egret_egress_sent_packets_total", label); sent < arrived || sent > float64(r.Sent) {
		t.Errorf("%v packets sent are reported, the probe sent %d and got %v answers", sent, r.Sent, arrived)
	}
	is("packets received", grown(before, after, "egret_egress_received_packets_total", label), arrived)
	answer := grown(before, after, "egret_egress_received_bytes_total", label) / arrived
	if answer != math.Trunc(answer) || answer < size { // the number, and where it was seen to come from
		t.Errorf("%v bytes received by %v packets: they are all of one size, more than %d", answer*arrived, arrived, size)
	}
	is("bytes sent", grown(before, after, "egret_egress_sent_bytes_total", label), size*grown(before, after, "egret_egress_sent_packets_total", label))
	is("connections opened", grown(before, after, "egret_egress_connections_opened_total", label), 1)
	for node, p := range after {
		owned, _ := p.value(of("egret_egress_owned"), label)
		passed, _ := p.value(of("egret_egress_sent_packets_total"), label)
		ports, _ := p.value(of("egret_egress_ports"), label)
		peers, _ := p.value(of("egret_gossip_members"), "state=alive")
		watching, _ := p.value(of("egret_etcd_watch_up"))
		degraded, _ := p.value(of("egret_degraded"))
		want := map[string][3]float64{gateway: {1, 1, 0}, home: {0, 0, 1024}}[node]
		is(node+" owns", owned, want[0])
		if (passed > 0) != (want[1] > 0) {
			t.Errorf("%s: %v packets passed", node, passed)
		}
		is(node+"'s ports", ports, want[2])
		is(node+"'s peers", peers, 2)
		is(node+"'s watch", watching, 1)
		is(node+"'s faults", degraded, 0)
		if more := grown(map[string]page{node: before[node]}, map[string]page{node: p}, "egret_permit_margin_seconds"); node == gateway && more == 0 {
			t.Errorf("%s renewed no permit", node) // others may hold what other tests leave
		}
		for _, busy := range []string{"egret_etcd_question_duration_seconds", "egret_pass_duration_seconds", "egret_change_to_kernel_seconds"} {
			// who holds nothing asks nothing
			if count, _ := p.value(of(busy)); count == 0 && (node == gateway || busy != "egret_etcd_question_duration_seconds") {
				t.Errorf("%s: %s counted nothing", node, busy)
			}
		}
	}

	// A planned move.
	heir := otherNode(gateway, home)
	before = after
	egret(t, "move", ip.String(), "--to", heir)
	after = agents(t)
	is("moves to the heir", grown(map[string]page{heir: before[heir]}, map[string]page{heir: after[heir]}, "egret_takeover_duration_seconds", "cause=move"), 1)
	is("moves", grown(before, after, "egret_takeover_duration_seconds", "cause=move"), 1)
	is("what the gateway gave up", grown(map[string]page{gateway: before[gateway]}, map[string]page{gateway: after[gateway]}, "egret_releases_total", "cause=move"), 1)

	// A power-off, under a probe.
	before = after
	r = probe(t, pod, 4*time.Second, func() {
		if err := cluster.Crash(t.Context(), heir); err != nil {
			t.Fatal(err)
		}
	})
	_, last := held(t, "metrics")
	then := scrape(t, "node", last, egress.StatusPort)
	if err := cluster.Recover(t.Context(), heir); err != nil {
		t.Fatal(err)
	}
	b, sumBefore := before[last].value(of("egret_takeover_duration_seconds"), "cause=crash")
	a, sumAfter := then.value(of("egret_takeover_duration_seconds"), "cause=crash")
	is("take-overs", a-b, 1)
	took := time.Duration((sumAfter - sumBefore) * float64(time.Second))
	t.Logf("power-off: the longest gap was %v, of which the metric says %v", r.LongestGap, took)
	if took > r.LongestGap+100*time.Millisecond || took < 500*time.Millisecond { // --permit is waited for
		t.Errorf("a take-over took %v by the metric, and the gap was %v", took, r.LongestGap)
	}
	sentThere, _ := then.value(of("egret_egress_sent_packets_total"), label)
	gotThere, _ := then.value(of("egret_egress_received_packets_total"), label)
	if sentThere == 0 || gotThere == 0 || sentThere > float64(r.Sent) {
		t.Errorf("after the power-off: %v packets sent, %v received by %s", sentThere, gotThere, last)
	}

	// crdsync says who holds it.
	p := scrape(t, "control", "", egress.SyncStatusPort)
	sync := func(name string, labels ...string) float64 {
		v, _ := p.value(metric(t, crdsync.Metrics(), name), labels...)
		return v
	}
	// the one that came back may be on its way
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if sync("egret_agents", "state=alive") == 3 {
			break
		}
		p = scrape(t, "control", "", egress.SyncStatusPort)
	}
	is("leader", sync("egret_crdsync_leader"), 1)
	is("nodes", sync("egret_nodes"), 3)
	is("agents", sync("egret_agents", "state=alive"), 3)
	is("pool", sync("egret_pool_ips", "pool=metrics"), 1)
	is("pool's use", sync("egret_pool_ips_used", "pool=metrics"), 1)
	is("ports given", sync("egret_egress_ports_given", label), 1024)
	is("problems", sync("egret_egress_problem", "egress=metrics"), 0)
	is("holder", sync("egret_egress_info", "egress=metrics", label, "pool=metrics", "node="+last), 1)
	if sync("egret_webhook_reviews_total", "verdict=allowed") == 0 || sync("egret_crdsync_event_to_etcd_seconds") == 0 || sync("egret_crdsync_pass_duration_seconds") == 0 {
		t.Error("crdsync counted no review, no event, or no pass")
	}
	// The probe's connection is open, for the kernel; it is counted beside who asks.
	eventually(t, 20*time.Second, func() error {
		if open, _ := scrape(t, "node", home, egress.StatusPort).value(of("egret_egress_connections"), label); open == 0 {
			return errors.New("no connection is open by metrics")
		}
		return nil
	})
	pageIsWell(t, "agent", agent.Metrics(), slices.Collect(maps.Values(after))...)
	pageIsWell(t, "crdsync", crdsync.Metrics(), p)
}

// sometimes are the metrics that are there only when something is wrong, or has been asked for, or counted.
var sometimes = []string{"egret_degraded", "egret_egress_conflict", "egret_egress_dropping", "egret_pool_refused", "egret_rp_filter_resets_total", "egret_egress_problem",
	"egret_releases_total", "egret_nat_log_lost_total", "egret_fast_path_packets_total", "egret_egress_connections"}

// pageIsWell holds pages against the documentation, and has promtool look at them.
func pageIsWell(t *testing.T, daemon string, list []monitor.Metric, pages ...page) {
	t.Helper()
	there := map[string]bool{}
	for _, p := range pages {
		for name := range p.families {
			there[name] = true
			known := slices.ContainsFunc(list, func(m monitor.Metric) bool { return m.Name == name })
			if strings.HasPrefix(name, "egret_") && !known && name != "egret_build_info" {
				t.Errorf("%s serves %s, which is not in docs/metrics.md", daemon, name)
			}
		}
		var bad bytes.Buffer
		c := exec.Command("promtool", "check", "metrics")
		c.Stdin, c.Stdout, c.Stderr = bytes.NewReader(p.text), &bad, &bad
		if err := c.Run(); err != nil {
			t.Errorf("promtool check metrics, %s: %v\n%s", daemon, err, bad.String())
		}
	}
	for _, m := range list {
		if !there[m.Name] && !slices.Contains(sometimes, m.Name) {
			t.Errorf("%s does not serve %s", daemon, m.Name)
		}
	}
}
