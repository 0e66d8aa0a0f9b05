// SPDX-License-Identifier: Apache-2.0

package siteca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
)

// A handshake costs more than anything else on the whoami page.
func TestSite_HandshakesOncePerMinuteAndVisitor(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(1000 * 24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	own, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		answers, err := lru.New[question, answer](maxAnswers)
		if err != nil {
			t.Fatal(err)
		}
		var handshakes atomic.Int64
		s := &Site{
			config: func() *tls.Config {
				handshakes.Add(1)
				return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
			},
			own:     func() []*x509.Certificate { return []*x509.Certificate{own} },
			answers: answers,
		}
		ask := func(name, from string, want int64) {
			t.Helper()
			var all sync.WaitGroup
			for range 100 {
				all.Go(func() {
					r := httptest.NewRequestWithContext(context.Background(), http.MethodGet, "https://"+name+"/whoami", nil)
					r.RemoteAddr = from
					if ca, err := s.CA(r); ca == nil || err != nil {
						t.Errorf("%s: got %v, %v; want the server's certificate", name, ca, err)
					}
				})
			}
			all.Wait()
			if got := handshakes.Load(); got != want {
				t.Errorf("%d handshakes after a hundred requests for %s from %s; want %d", got, name, from, want)
			}
		}
		ask("a.example.com", "100.64.0.1:1", 1)
		ask("a.example.com", "100.64.0.1:2", 1)
		ask("a.example.com", "100.64.0.2:1", 2)
		ask("b.example.com", "100.64.0.1:1", 3)
		time.Sleep(answerTTL)
		ask("a.example.com", "100.64.0.1:3", 4)
	})
}
