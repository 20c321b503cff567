package crdsync

import (
	"testing"
	"time"

	authn "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/egret-project/egret/internal/kubetest"
)

func TestATokenMayLookWhereItsUserHasTheRight(t *testing.T) {
	kube, err := kubernetes.NewForConfig(kubetest.New(t))
	if err != nil {
		t.Fatal(err)
	}
	const url = "/egret/page"
	token := func(name string) string {
		t.Helper()
		if _, err := kube.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns-" + name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if _, err := kube.CoreV1().ServiceAccounts("ns-"+name).Create(t.Context(), account, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		r, err := kube.CoreV1().ServiceAccounts("ns-"+name).CreateToken(t.Context(), name, &authn.TokenRequest{}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Status.Token
	}
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "page"}, Rules: []rbacv1.PolicyRule{{NonResourceURLs: []string{url}, Verbs: []string{"get"}}}}
	if _, err := kube.RbacV1().ClusterRoles().Create(t.Context(), role, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "page"}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "page"},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: "ann", Namespace: "ns-ann"}},
	}
	if _, err := kube.RbacV1().ClusterRoleBindings().Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	ann, bob := token("ann"), token("bob")
	may := MayGet(kube, url)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) { // the API server learns of a binding by a watch of its own
		if ok, err := may(t.Context(), ann); ok && err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatalf("who has the right: %v, %v; want yes", ok, err)
		}
	}
	for name, token := range map[string]string{"another user": bob, "nobody": "nonsense", "a token with another signature": ann[:len(ann)-8] + "AAAAAAAA"} {
		if ok, err := may(t.Context(), token); ok || err != nil {
			t.Errorf("%s: %v, %v; want no", name, ok, err)
		}
	}
}
