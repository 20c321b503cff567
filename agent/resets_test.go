package agent

import (
	"fmt"
	"log/slog"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// counterOf returns the values of a counter by its only label, as text.
func counterOf(t *testing.T, m *metrics, name string) string {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(m.counts)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, one := range f.Metric {
			if f.GetName() == name && len(one.Label) == 1 {
				out[one.Label[0].GetValue()] = one.GetCounter().GetValue()
			}
		}
	}
	return fmt.Sprint(out)
}

// TestEachResetOfRPFilterIsCounted is of the alert EgretRPFilterReset, by what routing.Diff sees pass by pass of the
// links of a kernel. What is counted is there as 0 before: Prometheus sees no increase in what begins with 1.
func TestEachResetOfRPFilterIsCounted(t *testing.T) {
	type pass struct {
		loosened, loose []string
		want            string
	}
	for name, passes := range map[string][]pass{
		"a link that the agent made":                                          {{[]string{"a"}, nil, "map[a:0]"}, {nil, []string{"a"}, "map[a:0]"}, {[]string{"a"}, nil, "map[a:1]"}, {[]string{"a"}, nil, "map[a:2]"}},
		"one of the agent before it":                                          {{nil, []string{"a"}, "map[a:0]"}, {[]string{"a"}, nil, "map[a:1]"}},
		"reset while no agent was there":                                      {{[]string{"a"}, nil, "map[a:0]"}},
		"a link that goes and comes again has the kernel's, which nobody set": {{nil, []string{"a"}, "map[a:0]"}, {nil, nil, "map[a:0]"}, {[]string{"a"}, nil, "map[a:0]"}},
		"of two links the one":                                                {{nil, []string{"a", "b"}, "map[a:0 b:0]"}, {[]string{"b"}, []string{"a"}, "map[a:0 b:1]"}},
	} {
		t.Run(name, func(t *testing.T) {
			k := &kernel{log: slog.New(slog.DiscardHandler), metrics: newMetrics()}
			for i, p := range passes {
				if k.countResets(p.loosened, p.loose); counterOf(t, k.metrics, metricResets.Name) != p.want {
					t.Errorf("pass %d: %s, want %s", i+1, counterOf(t, k.metrics, metricResets.Name), p.want)
				}
			}
		})
	}
}

// Likewise a take-over from a node that died.
func TestTakeoversAreThereBeforeTheFirst(t *testing.T) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(newMetrics().counts)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	causes := map[string]bool{}
	for _, f := range families {
		for _, one := range f.Metric {
			if f.GetName() == metricTakeover.Name {
				causes[one.Label[0].GetValue()] = one.GetHistogram().GetSampleCount() == 0
			}
		}
	}
	if !causes["crash"] || !causes["release"] {
		t.Errorf("series at the beginning, and whether they are 0: %v", causes)
	}
}
