package natlog

import (
	"bytes"
	"testing"
)

// A file of the log may hold anything: another program's lines, half a line, what somebody put there by a name of a
// pod.
func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"v":1,"event":"new","time":"2026-01-02T03:04:05Z","node":"n1","pod_name":"web-1","egress_ip":"203.0.113.5","port":2048}`))
	f.Add([]byte(`2026-01-02T03:04:05Z stdout F {"v":1,"event":"end"`))
	f.Add([]byte("{\"v\":1,\"event\":\"new\",\"time\":\"2026-01-02T03:04:05Z\",\"pod_name\":\"a\\n{\\\"v\\\":1}\"}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, ok := parse(b)
		if !ok {
			return
		}
		line := appendLine(nil, &l)
		if bytes.Count(line, []byte("\n")) != 1 || line[len(line)-1] != '\n' {
			t.Fatalf("%+v is written as %q: want one line", l, line)
		}
		again, ok := parse(line)
		if !ok || again.Event != l.Event || again.PodName != l.PodName || again.PodNamespace != l.PodNamespace || again.Egress != l.Egress {
			t.Errorf("%q is read as %+v, written as %q, and read as %+v (%t)", b, l, line, again, ok)
		}
	})
}
