package natlog

import (
	"bytes"
	"net/url"
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

// What is taken for a question is of an address, without one form of it for IPv4 in IPv6, and of a time that is not
// over before it begins.
func FuzzQuestion(f *testing.F) {
	for _, query := range []string{
		"", "ip=10.10.0.11&port=2048&from=2026-01-02T03:04:05Z&to=2026-01-02T03:04:06.5Z",
		"ip=::ffff:10.10.0.11&port=65535&from=0000-01-01T00:00:00Z&to=9999-12-31T23:59:59-23:59",
		"ip=fe80::1%25eth0&port=65536&from=x&to=2026-01-02T03:04:05%2B01:00",
	} {
		f.Add(query)
	}
	f.Fuzz(func(t *testing.T, query string) {
		v, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		q, err := ParseQuestion(v)
		if err != nil {
			return
		}
		if !q.IP.IsValid() || q.IP.Is4In6() || !q.From.Before(q.To) {
			t.Errorf("%q is %+v", query, q)
		}
		if q.From.UTC().Year() < 0 || q.To.UTC().Year() > 9999 {
			return // RFC 3339 has no such years
		}
		if again, err := ParseQuestion(q.Query()); err != nil || again.IP != q.IP || again.Port != q.Port || !again.From.Equal(q.From) || !again.To.Equal(q.To) {
			t.Errorf("%q is %+v, and asked on %+v, %v", query, q, again, err)
		}
	})
}
