package manifests_test

import (
	"testing"
	"time"

	authn "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/crdsync"
	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/manifests"
	"github.com/egret-project/egret/page"
)

// crdsync asks the API server as its own account, with the roles of the chart and no others: whose a token is, and
// whether he may look, who has the chart's role for that.
func TestCrdsyncMayAskWhoLooksAtThePage(t *testing.T) {
	t.Parallel()
	cfg := kubetest.New(t)
	kube, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var bindings []*rbacv1.ClusterRoleBinding
	for _, o := range manifests.ObjectsOf(t, "status page") {
		switch o := o.(type) {
		case *rbacv1.ClusterRole:
			_, err = kube.RbacV1().ClusterRoles().Create(t.Context(), o, metav1.CreateOptions{})
		case *rbacv1.ClusterRoleBinding:
			bindings = append(bindings, o)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	namespace := bindings[0].Subjects[0].Namespace
	if _, err := kube.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	token := func(name string) string {
		t.Helper()
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if _, err := kube.CoreV1().ServiceAccounts(namespace).Create(t.Context(), account, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		ask := &authn.TokenRequest{Spec: authn.TokenRequestSpec{Audiences: []string{page.Audience}}}
		r, err := kube.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), name, ask, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Status.Token
	}
	looks, other := token("looks"), token("other")
	asCrdsync := rest.CopyConfig(cfg)
	asCrdsync.Impersonate.UserName = "system:serviceaccount:" + namespace + ":egret-crdsync"
	its, err := kubernetes.NewForConfig(asCrdsync)
	if err != nil {
		t.Fatal(err)
	}
	may := crdsync.MayGet(its, page.Audience, page.URL)
	if ok, err := may(t.Context(), looks); ok || err == nil {
		t.Errorf("without its roles crdsync is told %v, %v; want an error", ok, err)
	}
	bindings = append(bindings, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "looks"}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "egret-page"},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: "looks", Namespace: namespace}},
	})
	for _, b := range bindings {
		if _, err := kube.RbacV1().ClusterRoleBindings().Create(t.Context(), b, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	// the API server learns of bindings by a watch of its own
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if ok, err := may(t.Context(), looks); ok && err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatalf("who has the role egret-page: %v, %v; want yes", ok, err)
		}
	}
	if ok, err := may(t.Context(), other); ok || err != nil {
		t.Errorf("who has no role: %v, %v; want no", ok, err)
	}
}
