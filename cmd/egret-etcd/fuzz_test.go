package main

import (
	"bytes"
	"context"
	"encoding/pem"
	"io"
	"net/http"
	"testing"

	"go.etcd.io/etcd/server/v3/embed"
)

// answering answers each request by these bytes.
type answering struct {
	cluster string
	body    []byte
}

func (a answering) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{"X-Etcd-Cluster-Id": {a.cluster}}, Body: io.NopCloser(bytes.NewReader(a.body))}, nil
}

// Who is asked for the members of its cluster may answer anything: a member that begins uses it, or tells what is
// wrong.
func FuzzMembers(f *testing.F) {
	for _, body := range []string{
		`[{"id":1,"peerURLs":["https://a:2380"],"name":"a","clientURLs":["https://a:2379"]}]`, `[{"id":1,"peerURLs":["https://b:2380"]}]`,
		`[]`, `[null]`, `null`, `{}`, `[{"id":-1}]`, `[{"peerURLs":null}]`,
	} {
		f.Add("cdf818194e3a8c32", []byte(body))
	}
	f.Add("", []byte(`[{}]`))
	m := &member{name: "a", initialCluster: "a=https://a:2380,b=https://b:2380", dataDir: "/data"}
	cfg := embed.NewConfig()
	f.Fuzz(func(t *testing.T, cluster string, body []byte) {
		for _, from := range []string{"https://a:2380", "https://b:2380"} {
			a, err := askOne(context.Background(), answering{cluster, body}, from)
			if err != nil {
				continue
			}
			_, _ = m.begun(cfg, []answer{a})
			_ = a.at("https://b:2380")
		}
	})
}

// A file of CAs is anybody's who makes the Secret.
func FuzzSubjects(f *testing.F) {
	f.Add([]byte(nil))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"))
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{0x30, 0x03, 0x30, 0x01, 0x00}}))
	f.Fuzz(func(t *testing.T, file []byte) {
		names, err := subjects(file)
		if (err == nil) != (len(names) > 0) {
			t.Errorf("%q: %d names, %v", file, len(names), err)
		}
	})
}
