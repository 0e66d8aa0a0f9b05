// SPDX-License-Identifier: Apache-2.0

// Package s3 is a Caddy module that stores session recordings in S3, or in a storage that
// has its interface.
//
// It is a Go module of its own, so that Caddy has the S3 client only where it is used, and
// nobody else gets it as a dependency: a proxy that holds the credentials of a cluster
// should have no more code than it needs. Build Caddy with both:
//
//	xcaddy build \
//		--with github.com/tailscale-impersonate/caddy-tailscale-impersonate \
//		--with github.com/tailscale-impersonate/caddy-tailscale-impersonate/s3
package s3

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/encrypt"
	"github.com/minio/minio-go/v7/pkg/s3utils"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

func init() { caddy.RegisterModule(new(Storage)) }

// The values of [Storage.Encryption].
const (
	encryptionS3  = "s3"
	encryptionKMS = "kms"
)

const (
	// partSize is the size of the parts that larger recordings are sent in, which are
	// held in memory, and maxParts how many there may be. For what is larger still, the
	// client chooses the size.
	partSize = 8 << 20
	maxParts = 10_000
)

// Storage stores recordings in a bucket of S3, or of a storage with its interface. All
// values can hold placeholders, such as `{env.BUCKET}` and `{file./run/secrets/s3}`.
//
// The account needs `s3:PutObject`, `s3:AbortMultipartUpload` and, with `object_lock`,
// `s3:PutObjectRetention`. A page of recordings also needs `s3:GetObject` and
// `s3:ListBucket`. Nothing is ever deleted: use the rules of the bucket.
type Storage struct {
	// The name of the bucket, which has to exist.
	Bucket string `json:"bucket,omitempty"`

	// The URL of the storage, such as `https://minio.example.com:9000`.
	//
	// Default: that of Amazon S3 in `region`.
	Endpoint string `json:"endpoint,omitempty"`

	// The region of the bucket.
	//
	// Default: `AWS_REGION`, `AWS_DEFAULT_REGION`, or with an `endpoint` `us-east-1`.
	Region string `json:"region,omitempty"`

	// What the names of objects begin with, such as `prod/`. The name of a recording
	// follows at once. Sites whose readers must not see each other's recordings need
	// prefixes of their own, of which none begins with another.
	//
	// Default: none.
	Prefix string `json:"prefix,omitempty"`

	// The access key. Without it, the usual places are asked, in this order: the
	// variables `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, the file
	// `AWS_SHARED_CREDENTIALS_FILE` or `~/.aws/credentials` with the profile
	// `AWS_PROFILE`, and the role of the pod, container or machine.
	AccessKeyID     string `json:"access_key_id,omitempty"`
	SecretAccessKey string `json:"secret_access_key,omitempty"`

	// How the storage encrypts recordings: `s3` with keys of its own, or `kms` with the
	// key `kms_key`.
	//
	// Default: what the bucket says.
	Encryption string `json:"encryption,omitempty"`
	KMSKey     string `json:"kms_key,omitempty"`

	// Locks recordings against deletion: `governance`, from which accounts can be
	// exempt, or `compliance`. The bucket must have object lock.
	//
	// Default: what the bucket says.
	ObjectLock string `json:"object_lock,omitempty"`

	// How long recordings are locked.
	ObjectLockFor caddy.Duration `json:"object_lock_for,omitempty"`

	// The storage class of recordings.
	//
	// Default: what the bucket says.
	StorageClass string `json:"storage_class,omitempty"`

	// Put the bucket into the path of URLs rather than into the host, as most storages
	// other than Amazon's need. Those are recognized: it is for the others.
	//
	// Default: `false`.
	PathStyle bool `json:"path_style,omitempty"`

	// A file with the certificates, in PEM, of the authorities that are trusted rather
	// than those of the system.
	TrustedCA string `json:"trusted_ca,omitempty"`

	// Allow an `endpoint` with `http://`. Whoever sees the traffic then reads the
	// recordings.
	//
	// Default: `false`.
	InsecureHTTP bool `json:"insecure_http,omitempty"`

	client *minio.Client
	creds  *credentials.Credentials
	sse    encrypt.ServerSide
	where  string
	idle   func()
}

// CaddyModule returns the Caddy module information.
func (*Storage) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  recordings.Namespace + ".s3",
		New: func() caddy.Module { return new(Storage) },
	}
}

// Provision sets up the storage. It connects to nothing.
func (s *Storage) Provision(caddy.Context) error {
	replacer := caddy.NewReplacer()
	for name, value := range map[string]*string{
		"bucket": &s.Bucket, "endpoint": &s.Endpoint, "region": &s.Region, "prefix": &s.Prefix,
		"access_key_id": &s.AccessKeyID, "secret_access_key": &s.SecretAccessKey,
		"kms_key": &s.KMSKey, "trusted_ca": &s.TrustedCA, "storage_class": &s.StorageClass,
	} {
		replaced, err := replacer.ReplaceOrErr(*value, true, true)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		*value = strings.TrimSuffix(replaced, "\n") // of a file
	}
	endpoint, err := s.check()
	if err != nil {
		return err
	}
	if s.sse, err = s.encryption(); err != nil {
		return err
	}
	transport, err := s.transport(endpoint.Scheme == "https")
	if err != nil {
		return err
	}
	s.idle = transport.CloseIdleConnections
	if s.AccessKeyID != "" {
		s.creds = credentials.NewStaticV4(s.AccessKeyID, s.SecretAccessKey, "")
	} else {
		s.creds = credentials.New(&usualCredentials{&credentials.Chain{Providers: []credentials.Provider{
			&credentials.EnvAWS{}, &credentials.FileAWSCredentials{}, &credentials.IAM{},
		}}})
	}
	lookup := minio.BucketLookupAuto
	if s.PathStyle {
		lookup = minio.BucketLookupPath
	}
	s.where = fmt.Sprintf("s3 %s/%s/%s", endpoint, s.Bucket, s.Prefix)
	s.client, err = minio.New(endpoint.Host, &minio.Options{
		Creds: s.creds, Secure: endpoint.Scheme == "https", Transport: transport,
		Region: s.Region, BucketLookup: lookup,
		MaxRetries: 1, // the caller tries again
	})
	if err != nil {
		return fmt.Errorf("endpoint %q: %w", s.Endpoint, err)
	}
	return nil
}

// check checks the options, fills in those that have a default, and returns the URL of the
// storage.
func (s *Storage) check() (*url.URL, error) {
	if s.Bucket == "" {
		return nil, errors.New("bucket: missing")
	}
	if err := s3utils.CheckValidBucketNameStrict(s.Bucket); err != nil {
		return nil, fmt.Errorf("bucket %q: %w", s.Bucket, err)
	}
	for _, variable := range []string{"AWS_REGION", "AWS_DEFAULT_REGION"} {
		if s.Region == "" {
			s.Region = os.Getenv(variable)
		}
	}
	switch {
	case s.Endpoint == "" && s.Region == "":
		return nil, errors.New("region: missing; without an endpoint, it says where the bucket is")
	case s.Endpoint == "":
		s.Endpoint = "https://s3." + s.Region + ".amazonaws.com"
	case s.Region == "":
		s.Region = "us-east-1"
	}
	endpoint, err := url.Parse(s.Endpoint)
	if err != nil {
		return nil, errors.New("endpoint: is not a URL") // the error has its text, and maybe a password
	}
	endpoint.Path = strings.TrimSuffix(endpoint.Path, "/")
	switch {
	case endpoint.Scheme != "http" && endpoint.Scheme != "https", endpoint.Host == "", endpoint.Path != "", endpoint.RawQuery != "", endpoint.User != nil:
		return nil, fmt.Errorf("endpoint %q: must be a URL without a user and a path, such as https://minio.example.com:9000", redacted(endpoint))
	case endpoint.Scheme == "http" && !s.InsecureHTTP:
		return nil, fmt.Errorf("endpoint %q: recordings would be sent without encryption; use https, or say insecure_http", s.Endpoint)
	}
	switch {
	case strings.HasPrefix(s.Prefix, "/") || strings.Contains(s.Prefix, "//") || s3utils.CheckValidObjectNamePrefix(s.Prefix) != nil:
		return nil, fmt.Errorf("prefix %q: must be empty, or the beginning of an object's name, such as prod/", s.Prefix)
	case (s.AccessKeyID == "") != (s.SecretAccessKey == ""):
		return nil, errors.New("access_key_id and secret_access_key: only one of them has a value")
	case s.Encryption != "" && s.Encryption != encryptionS3 && s.Encryption != encryptionKMS:
		return nil, fmt.Errorf("encryption %q: must be %s or %s", s.Encryption, encryptionS3, encryptionKMS)
	case (s.Encryption == encryptionKMS) != (s.KMSKey != ""):
		return nil, errors.New("encryption kms: needs a key, and the others take none")
	case s.ObjectLock == "" && s.ObjectLockFor == 0:
	case s.mode() == "":
		return nil, fmt.Errorf("object_lock %q: must be governance or compliance", s.ObjectLock)
	case s.ObjectLockFor <= 0:
		return nil, fmt.Errorf("object_lock %s: needs a duration, such as 90d", s.ObjectLock)
	}
	return endpoint, nil
}

// redacted returns the text of u without a password and without a query.
func redacted(u *url.URL) string {
	shown := *u
	if shown.RawQuery != "" {
		shown.RawQuery = "..."
	}
	return shown.Redacted()
}

// mode returns the mode of the lock, empty if there is none.
func (s *Storage) mode() minio.RetentionMode {
	switch s.ObjectLock {
	case "governance":
		return minio.Governance
	case "compliance":
		return minio.Compliance
	}
	return ""
}

func (s *Storage) encryption() (encrypt.ServerSide, error) {
	switch s.Encryption {
	case encryptionS3:
		return encrypt.NewSSE(), nil
	case encryptionKMS:
		sse, err := encrypt.NewSSEKMS(s.KMSKey, nil)
		if err != nil {
			return nil, fmt.Errorf("encryption kms: %w", err)
		}
		return sse, nil
	}
	return nil, nil
}

func (s *Storage) transport(secure bool) (*http.Transport, error) {
	transport, err := minio.DefaultTransport(secure)
	if err != nil {
		return nil, err
	}
	if s.TrustedCA == "" {
		return transport, nil
	}
	pem, err := os.ReadFile(s.TrustedCA)
	if err != nil {
		return nil, fmt.Errorf("trusted_ca: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("trusted_ca %s: holds no certificate in PEM", s.TrustedCA)
	}
	if transport.TLSClientConfig == nil {
		transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	transport.TLSClientConfig.RootCAs = roots
	return transport, nil
}

// Cleanup closes connections that are not used.
func (s *Storage) Cleanup() error {
	if s.idle != nil {
		s.idle()
	}
	return nil
}

// usualCredentials are those of the usual places. If there are none, requests are not sent
// without.
type usualCredentials struct{ *credentials.Chain }

var errNoCredentials = errors.New("no credentials: set access_key_id and secret_access_key, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give Caddy a credentials file or a role")

// RetrieveWithCredContext implements [credentials.Provider].
func (c *usualCredentials) RetrieveWithCredContext(cc *credentials.CredContext) (credentials.Value, error) {
	value, err := c.Chain.RetrieveWithCredContext(cc)
	if err == nil && value.AccessKeyID == "" {
		err = errNoCredentials
	}
	return value, err
}

// Retrieve implements [credentials.Provider].
func (c *usualCredentials) Retrieve() (credentials.Value, error) {
	return c.RetrieveWithCredContext(&credentials.CredContext{Client: http.DefaultClient})
}

// String implements [recordings.Storage].
func (s *Storage) String() string { return s.where }

// Put implements [recordings.Storage]. The storage checks the content against its MD5,
// which object lock needs as well.
func (s *Storage) Put(ctx context.Context, name string, content *io.SectionReader) error {
	options := minio.PutObjectOptions{
		ContentType:          "application/x-asciicast",
		ServerSideEncryption: s.sse,
		StorageClass:         s.StorageClass,
		SendContentMd5:       true,
	}
	if content.Size() < partSize*maxParts {
		options.PartSize = partSize
	}
	if mode := s.mode(); mode != "" {
		options.Mode, options.RetainUntilDate = mode, time.Now().Add(time.Duration(s.ObjectLockFor)).UTC()
	}
	_, err := s.client.PutObject(ctx, s.Bucket, s.Prefix+name, content, content.Size(), options)
	return s.explain(err)
}

// explain adds what the storage answered to err. If it refused the request, the
// credentials are looked up again: they may have been replaced.
func (s *Storage) explain(err error) error {
	if err == nil {
		return nil
	}
	response := minio.ToErrorResponse(err)
	if response.StatusCode == 0 {
		return err
	}
	if response.StatusCode/100 == 4 {
		s.creds.Expire()
	}
	return fmt.Errorf("%s (%d): %w", response.Code, response.StatusCode, err)
}

// List implements [recordings.Reader].
func (s *Storage) List(ctx context.Context, after string, n int) ([]recordings.Entry, error) {
	options := minio.ListObjectsOptions{Prefix: s.Prefix}
	if after != "" {
		options.StartAfter = s.Prefix + after + recordings.Ext + recordings.Partial
	}
	var entries []recordings.Entry
	for object := range s.client.ListObjectsIter(ctx, s.Bucket, options) {
		if object.Err != nil {
			return nil, s.explain(object.Err)
		}
		id, complete, ok := recordings.ParseName(strings.TrimPrefix(object.Key, s.Prefix))
		// The complete recording comes before a partial one of the same session.
		if !ok || len(entries) > 0 && entries[len(entries)-1].ID == id {
			continue
		}
		if len(entries) == n {
			break
		}
		entries = append(entries, recordings.Entry{ID: id, Size: object.Size, Modified: object.LastModified, Complete: complete})
	}
	// Between two pages, the client ends without an error: what follows would seem gone.
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return entries, nil
}

// Open implements [recordings.Reader].
func (s *Storage) Open(ctx context.Context, id string) (io.ReadCloser, recordings.Entry, error) {
	if !recordings.ValidID(id) {
		return nil, recordings.Entry{}, fmt.Errorf("recording %q: %w", id, fs.ErrNotExist)
	}
	for _, ext := range []string{recordings.Ext, recordings.Ext + recordings.Partial} {
		o := &object{ctx: ctx, storage: s, name: s.Prefix + id + ext}
		info, err := o.open()
		if err == nil {
			o.size = info.Size
			return o, recordings.Entry{ID: id, Size: info.Size, Modified: info.LastModified, Complete: ext == recordings.Ext}, nil
		}
		if minio.ToErrorResponse(err).Code != minio.NoSuchKey {
			return nil, recordings.Entry{}, s.explain(err)
		}
	}
	return nil, recordings.Entry{}, fmt.Errorf("recording %s: %w", id, fs.ErrNotExist)
}

// Interface guards
var (
	_ caddy.Module         = (*Storage)(nil)
	_ caddy.Provisioner    = (*Storage)(nil)
	_ caddy.CleanerUpper   = (*Storage)(nil)
	_ recordings.Storage   = (*Storage)(nil)
	_ credentials.Provider = (*usualCredentials)(nil)
	_ io.ReadCloser        = (*object)(nil)
)
