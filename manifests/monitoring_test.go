package manifests

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/crdsync"
	"github.com/egret-project/egret/crdsync/credentials"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
)

type alert struct {
	Alert, Expr         string
	Labels, Annotations map[string]string
}

func content(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func alerts(t *testing.T) (out []alert) {
	t.Helper()
	var file struct {
		Groups []struct{ Rules []alert }
	}
	if err := yaml.Unmarshal(content(t, "monitoring/rules.yaml"), &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		out = append(out, g.Rules...)
	}
	if len(out) < 20 {
		t.Fatalf("%d alerts", len(out))
	}
	return out
}

func promtool(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("promtool", args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func TestEachAlertFiresAndIsQuietBefore(t *testing.T) {
	promtool(t, "check", "rules", "monitoring/rules.yaml")
	promtool(t, "test", "rules", "monitoring/rules_test.yaml")
	var tests struct {
		Tests []struct {
			Name            string
			PromqlExprTests []struct {
				Expr       string `json:"expr"`
				ExpSamples []any  `json:"exp_samples"`
			} `json:"promql_expr_test"`
		}
	}
	if err := yaml.Unmarshal(content(t, "monitoring/rules_test.yaml"), &tests); err != nil {
		t.Fatal(err)
	}
	// One that is not tested, or of which no test wants that it fires, or none that it is quiet.
	for _, a := range alerts(t) {
		fires, quiet := false, false
		for _, tt := range tests.Tests {
			for _, e := range tt.PromqlExprTests {
				if tt.Name == a.Alert && strings.Contains(e.Expr, fmt.Sprintf("alertname=%q", a.Alert)) {
					fires, quiet = fires || len(e.ExpSamples) > 0, quiet || len(e.ExpSamples) == 0
				}
			}
		}
		if !fires || !quiet {
			t.Errorf("%s: rules_test.yaml sees it fire: %v, quiet: %v", a.Alert, fires, quiet)
		}
	}
}

func TestEachAlertSaysWhatToDo(t *testing.T) {
	var sections []string
	for _, m := range regexp.MustCompile(`(?m)^### (\w+)$`).FindAllStringSubmatch(string(content(t, "../docs/alerts.md")), -1) {
		sections = append(sections, m[1])
	}
	var names []string
	for _, a := range alerts(t) {
		names = append(names, a.Alert)
		if url := a.Annotations["runbook_url"]; !strings.HasSuffix(url, "/docs/alerts.md#"+strings.ToLower(a.Alert)) {
			t.Errorf("%s: runbook_url %q", a.Alert, url)
		}
		if s := a.Labels["severity"]; s != "critical" && s != "warning" || a.Annotations["summary"] == "" {
			t.Errorf("%s: severity %q, summary %q", a.Alert, s, a.Annotations["summary"])
		}
	}
	if !slices.Equal(sections, names) {
		t.Errorf("docs/alerts.md has\n%v\nthe rules have\n%v", sections, names)
	}
}

// name matches the metrics in an expression.
var name = regexp.MustCompile(`\begret_[a-z0-9_]+`)

func metricsExist(t *testing.T, what, expr string) {
	t.Helper()
	found := name.FindAllString(expr, -1)
	if len(found) == 0 {
		t.Errorf("%s: %q is about no metric", what, expr)
	}
	for _, n := range found {
		ok := slices.ContainsFunc(slices.Concat(agent.Metrics(), crdsync.Metrics()), func(m monitor.Metric) bool {
			if m.Type == monitor.Histogram {
				rest, is := strings.CutPrefix(n, m.Name)
				return is && slices.Contains([]string{"_bucket", "_count", "_sum"}, rest)
			}
			return n == m.Name
		})
		if !ok {
			t.Errorf("%s: there is no metric %s", what, n)
		}
	}
}

func TestAlertsAreAboutMetricsThatExist(t *testing.T) {
	for _, a := range alerts(t) {
		metricsExist(t, a.Alert, a.Expr)
	}
}

func TestTheDashboardShowsMetricsThatExist(t *testing.T) {
	var board struct {
		Title  string
		Panels []struct {
			ID          int
			Title, Type string
			GridPos     struct{ X, Y, W, H int }
			Targets     []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(content(t, "monitoring/dashboard.json"), &board); err != nil {
		t.Fatal(err)
	}
	if len(board.Panels) < 10 {
		t.Fatalf("%d panels", len(board.Panels))
	}
	rules := "groups:\n- name: panels\n  rules:\n"
	taken := map[[2]int]string{}
	ids := map[int]bool{}
	for _, p := range board.Panels {
		if ids[p.ID] {
			t.Errorf("%s: id %d is another panel's", p.Title, p.ID)
		}
		ids[p.ID] = true
		for x := range p.GridPos.W {
			for y := range p.GridPos.H {
				at := [2]int{p.GridPos.X + x, p.GridPos.Y + y}
				if taken[at] != "" || at[0] >= 24 {
					t.Errorf("%s covers %s at %v", p.Title, taken[at], at)
				}
				taken[at] = p.Title
			}
		}
		for i, target := range p.Targets {
			metricsExist(t, p.Title, target.Expr)
			rules += fmt.Sprintf("  - {record: 'panel:%d:%d', expr: '%s'}\n", p.ID, i, strings.ReplaceAll(target.Expr, "$__rate_interval", "5m"))
		}
	}
	file := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", file) // that each expression is one
}

// Debian's promtool knows no discovery in Kubernetes: the file is looked at for what is Egret's.
func TestThePortsAndNamesOfTheScrapeConfigAreTheDaemons(t *testing.T) {
	var file struct {
		Scrapes []struct {
			Job    string `json:"job_name"`
			Scheme string
			TLS    struct {
				Server string `json:"server_name"`
			} `json:"tls_config"`
			Relabels []struct {
				Target      string `json:"target_label"`
				Regex       string
				Replacement string
			} `json:"relabel_configs"`
		} `json:"scrape_configs"`
	}
	if err := yaml.Unmarshal(content(t, "monitoring/scrape.yaml"), &file); err != nil {
		t.Fatal(err)
	}
	ports := map[string]int{"egret-agent": egress.StatusPort, "egret-crdsync": egress.SyncStatusPort}
	made := credentials.Config{Namespace: "egret-system"}
	names := map[string]string{"egret-agent": made.AgentName(), "egret-crdsync": made.CrdsyncName()}
	for _, s := range file.Scrapes {
		if s.TLS.Server != names[s.Job] {
			t.Errorf("%s: its certificate is to be for %s, want %s", s.Job, s.TLS.Server, names[s.Job])
		}
		for host, want := range map[string]string{"10.0.0.1": "10.0.0.1:%d", "fd00::1": "[fd00::1]:%d"} {
			got := ""
			for _, r := range s.Relabels {
				if re := regexp.MustCompile("^(?:" + r.Regex + ")$"); r.Target == "__address__" && re.MatchString(host) {
					got = re.ReplaceAllString(host, r.Replacement)
				}
			}
			if want = fmt.Sprintf(want, ports[s.Job]); got != want || s.Scheme != "https" {
				t.Errorf("%s: %s is asked as %s://%s, want https://%s", s.Job, host, s.Scheme, got, want)
			}
		}
		delete(ports, s.Job)
	}
	if len(ports) > 0 {
		t.Errorf("not scraped: %v", ports)
	}
}
