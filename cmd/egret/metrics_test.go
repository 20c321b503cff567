package main

import (
	"flag"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/cloud"
	"github.com/egret-project/egret/crdsync"
	"github.com/egret-project/egret/monitor"
)

var update = flag.Bool("update", false, "write docs/metrics.md anew")

const metricsFile = "../../docs/metrics.md"

func metricsPage() string {
	return `# Metrics

<!-- Made from the code: go test ./cmd/egret -run MetricsPage -update -->

The agent answers at http://127.0.0.1:8481/metrics, crdsync at http://127.0.0.1:8482/metrics, to processes of their
node; ` + "`--metrics-address`" + ` serves them to Prometheus elsewhere, over TLS, to who shows a certificate
([security.md](security.md) says who may ask), in the chart with ` + "`metrics.enabled`" + `. Beside the metrics below there are
` + "`egret_build_info`" + `, with the version, and those of the Go runtime and of the process (` + "`go_*`, `process_*`" + `).
` + "`manifests/monitoring`" + ` has alert rules, what to do about each, and a dashboard.

No metric has a label for a pod. Those of egress IPs are there for the IPs that a node holds or that its pods use:
summed over all nodes, what was sent and received by an IP is right also where it moves, since each gateway counts what
passes it. What is read from the kernel is read when it is asked for, once a second at most; a count begins anew where
the kernel's does, as when an IP comes back to a node, which Prometheus takes for a reset of the counter. A scrape of an
agent with 1,000 egress IPs takes less than 50 ms of a processor (` + "`go test ./agent -run ScrapeOf1000`" + `).

## The agent

` + monitor.Document(agent.Metrics()) + `
## crdsync

` + monitor.Document(crdsync.Metrics()) + `
## The controller of a cloud's addresses

` + "`egret cloud aws`" + ` ([aws.md](aws.md)), at http://127.0.0.1:8486/metrics.

` + monitor.Document(cloud.Metrics())
}

func TestTheMetricsPageIsWhatTheCodeSays(t *testing.T) {
	want := metricsPage()
	if *update {
		if err := os.WriteFile(metricsFile, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(metricsFile)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(have)); diff != "" {
		t.Errorf("docs/metrics.md is not made from this code: go test ./cmd/egret -run MetricsPage -update (-want +got):\n%s", diff)
	}
}

// https://prometheus.io/docs/practices/naming/
func TestMetricsAreNamedAsPrometheusAsksFor(t *testing.T) {
	name := regexp.MustCompile(`^egret_[a-z0-9]+(_[a-z0-9]+)*$`)
	for daemon, list := range map[string][]monitor.Metric{"agent": agent.Metrics(), "crdsync": crdsync.Metrics(), "cloud": cloud.Metrics()} {
		seen := map[string]bool{}
		for _, m := range list {
			switch {
			case !name.MatchString(m.Name):
				t.Errorf("%s: not egret_, in snake case", m.Name)
			case seen[m.Name]:
				t.Errorf("%s: %s has it twice", m.Name, daemon)
			case (m.Type == monitor.Counter) != strings.HasSuffix(m.Name, "_total"):
				t.Errorf("%s: a counter, and nothing else, ends in _total", m.Name)
			case (m.Type == monitor.Histogram) != (m.Buckets != nil) || m.Type == monitor.Histogram && !strings.HasSuffix(m.Name, "_seconds"):
				t.Errorf("%s: a histogram has buckets, and its unit in its name", m.Name)
			case !strings.HasSuffix(m.Help, ".") || strings.ContainsAny(m.Help, "|\n"):
				t.Errorf("%s: its text %q is no sentence on a line", m.Name, m.Help)
			}
			for _, l := range m.Labels {
				if strings.Contains(l, "pod") || l == "le" || l == "instance" || l == "job" {
					t.Errorf("%s: label %s", m.Name, l)
				}
			}
			seen[m.Name] = true
		}
	}
}
