package egress

import (
	"net/url"
	"testing"
)

// What is taken for a question is asked on in the same words, whoever wrote it.
func FuzzQuestion(f *testing.F) {
	for _, query := range []string{
		"", "ip=10.10.0.11&id=1", "ip=10.10.0.11&id=1&pod=10.244.1.2&peer=2&to=192.0.2.1&protocol=6&port=443&send=true",
		"ip=fd00::b1&id=65535&pod=fd00::2&to=fd00::3&protocol=58&port=0&send=true", "ip=::ffff:10.10.0.11&id=1", "ip=fe80::1%25eth0&id=1", "id=1&id=2&protocol=256",
	} {
		f.Add(query)
	}
	f.Fuzz(func(t *testing.T, query string) {
		v, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		if q, err := ParseKernelQuestion(v); err == nil {
			if again, err := ParseKernelQuestion(q.Query()); err != nil || again != q {
				t.Errorf("%q is %+v, and asked on %+v, %v", query, q, again, err)
			}
		}
		if q, err := ParseLiveQuestion(v); err == nil {
			if again, err := ParseLiveQuestion(q.Query()); err != nil || again != q {
				t.Errorf("%q is %+v, and asked on %+v, %v", query, q, again, err)
			}
			if !q.To.IsValid() || q.Send && !q.Pod.IsValid() {
				t.Errorf("%q is %+v", query, q)
			}
		}
	})
}
