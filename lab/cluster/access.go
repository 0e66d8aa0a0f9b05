// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// AdminKubeconfig writes the administrator's kubeconfig.
func (c *Cluster) AdminKubeconfig(path string) error {
	return c.writeKubeconfig(path, &api.AuthInfo{
		ClientCertificateData: c.admin.CertData,
		ClientKeyData:         c.admin.KeyData,
	})
}

// As returns a configuration for clients that authenticate as user, in groups, with
// a certificate of their own.
func (c *Cluster) As(user string, groups ...string) (*rest.Config, error) {
	added, err := c.plane.AddUser(envtest.User{Name: user, Groups: groups}, &rest.Config{QPS: -1})
	if err != nil {
		return nil, fmt.Errorf("certificate for %s: %w", user, err)
	}
	return added.Config(), nil
}

// WriteTokenKubeconfig writes a kubeconfig that authenticates with the token in
// tokenFile. Clients read the file again when it changes.
func (c *Cluster) WriteTokenKubeconfig(path, tokenFile string) error {
	tokenFile, err := filepath.Abs(tokenFile)
	if err != nil {
		return fmt.Errorf("write kubeconfig: %w", err)
	}
	return c.writeKubeconfig(path, &api.AuthInfo{TokenFile: tokenFile})
}

// writeKubeconfig writes a kubeconfig for the cluster with the given user.
func (c *Cluster) writeKubeconfig(path string, user *api.AuthInfo) error {
	const name = "lab"
	config := api.NewConfig()
	config.Clusters[name] = &api.Cluster{Server: c.Host(), CertificateAuthorityData: c.CA()}
	config.AuthInfos[name] = user
	config.Contexts[name] = &api.Context{Cluster: name, AuthInfo: name}
	config.CurrentContext = name
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		return fmt.Errorf("write kubeconfig: %w", err)
	}
	return nil
}

// ServiceAccountToken returns a token of an existing service account that is valid
// for d. The API server refuses less than ten minutes.
func (c *Cluster) ServiceAccountToken(ctx context.Context, namespace, name string, d time.Duration) (string, error) {
	seconds := int64(d.Seconds())
	request := &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds},
	}
	answer, err := c.client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, name, request, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("token for service account %s/%s: %w", namespace, name, err)
	}
	return answer.Status.Token, nil
}
