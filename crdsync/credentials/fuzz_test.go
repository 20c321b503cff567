package credentials

import (
	"bytes"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Who may write the Secret of a CA may write anything: it is a CA with its key, or it is none, and what is kept of it
// is what it was.
func FuzzAuthority(f *testing.F) {
	now := time.Now()
	a := authority{name: "etcd"}
	if _, err := a.advance(now); err != nil {
		f.Fatal(err)
	}
	if _, err := a.advance(a.signs.cert.NotAfter.Add(-time.Hour)); err != nil || a.next == nil {
		f.Fatalf("no CA follows: %v", err)
	}
	whole, err := a.data()
	if err != nil {
		f.Fatal(err)
	}
	cert, key := whole[corev1.TLSCertKey], whole[corev1.TLSPrivateKeyKey]
	f.Add(cert, key, whole[nextCert], whole[nextKey])
	f.Add(cert, key, []byte(nil), []byte(nil))
	f.Add(cert, key, whole[nextCert], key)
	f.Add(append(bytes.Clone(cert), whole[nextCert]...), key, []byte("x"), []byte(nil))
	f.Add(append(bytes.Clone(cert), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"...), key, []byte(nil), []byte(nil))
	f.Fuzz(func(t *testing.T, cert, key, next, nextsKey []byte) {
		a, err := readAuthority("etcd", map[string][]byte{corev1.TLSCertKey: cert, corev1.TLSPrivateKeyKey: key, nextCert: next, nextKey: nextsKey})
		if err != nil {
			return
		}
		if !a.signs.cert.IsCA || a.signs.key == nil || a.next != nil && (!a.next.cert.IsCA || a.next.key == nil) {
			t.Errorf("%s is taken for a CA", cert)
		}
		data, err := a.data()
		if err != nil {
			t.Fatal(err)
		}
		again, err := readAuthority("etcd", data)
		if err != nil || !bytes.Equal(again.trusted(), a.trusted()) {
			t.Errorf("trusted is\n%s, and then, %v,\n%s", a.trusted(), err, again.trusted())
		}
	})
}
